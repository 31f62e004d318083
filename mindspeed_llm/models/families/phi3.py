"""Phi-3 and Phi-3.5-mini, Phi-4(-mini): q, k, v in one tensor, gate and up in one, longrope.

Defaults are those of `transformers.Phi3Config`.
"""

from collections.abc import Mapping
from typing import Any

from mindspeed_llm.models.families.base import Family, HfKey, Join
from mindspeed_llm.models.families.keys import llama_keys, window_of_every_layer
from mindspeed_llm.models.families.rows import attention_rows, embedding_row, final_rows, mlp_rows, norm_row

FORMER_NAMES = ("su", "yarn")
"""What older Phi-3 configs call longrope."""


def rope_scaling(flat: Mapping[str, Any]) -> dict[str, Any] | None:
    """HF's dictionary; under its former names longrope is longrope, as transformers reads it."""
    scaling = flat.get("rope_scaling")
    if scaling is None or scaling["rope_type"] not in FORMER_NAMES:
        return scaling
    original = flat.get("original_max_position_embeddings", 4096)
    return {"original_max_position_embeddings": original, **scaling, "rope_type": "longrope"}


PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    config=llama_keys(
        positions=4096,
        epsilon=1e-5,
        rotary_percent=HfKey("partial_rotary_factor", 1.0),
        rope_scaling=rope_scaling,
        **window_of_every_layer(default=None),
    ),
    fixed={},
    requires={"hidden_act": "silu", "attention_bias": False, "rope_local_base_freq": None},
    weights=(
        embedding_row(),
        norm_row("input_layernorm", "input_layernorm"),
        *attention_rows(qkv=("self_attn.qkv_proj",), join=Join.STACKED_QKV),
        norm_row("pre_mlp_layernorm", "post_attention_layernorm"),
        *mlp_rows(fc1=("mlp.gate_up_proj",), join=Join.SAME),
        *final_rows(),
    ),
    aliases=("phi3.5", "phi35"),
)
