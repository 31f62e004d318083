"""gpt-oss (20B, 120B): attention sinks, windows in every other layer, biases throughout, a clamped gated activation.

The hub's bf16 layout holds all experts in one tensor, transposed, with gate and up rows taking turns. Defaults are
those of `transformers.GptOssConfig`.
"""

from collections.abc import Mapping
from typing import Any

from mindspeed_llm.models.families.base import Family, HfKey, Join, Kind, Stacked, Weight
from mindspeed_llm.models.families.keys import llama_keys
from mindspeed_llm.models.families.moe_rows import EXPERT, every_layer, layer_rows, network_rows, router_rows
from mindspeed_llm.models.families.rows import HF_LAYER, LAYER, Rows, attention_rows, sinks_row

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""transformers' default where config.json says nothing about rotary positions."""


def layer_types(flat: Mapping[str, Any]) -> tuple[str, ...]:
    """Windows in every other layer, from the first on, where config.json does not say."""
    given = tuple(flat.get("layer_types") or ())
    return given or tuple(("sliding_attention", "full_attention")[n % 2] for n in range(flat["num_hidden_layers"]))


def rope_scaling(flat: Mapping[str, Any]) -> dict[str, Any] | None:
    """HF's dictionary, or the class's own where there is no entry at all."""
    said = "rope_parameters" in flat or "rope_scaling" in flat and flat["rope_scaling"] is not None
    return flat.get("rope_scaling") if said else dict(YARN)


def stacked_expert_rows(hf: str = "mlp.experts") -> Rows:
    """The experts: HF tensors [experts, hidden, 2 ffn] and [experts, ffn, hidden], biases [experts, rows]."""

    def row(name: str, tensor: str, kind: Kind, stacked: Stacked, join: Join, *shape: str) -> Weight:
        name, tensor = f"{LAYER}{EXPERT}{name}", f"{HF_LAYER}{hf}.{tensor}"
        return Weight(name, (tensor,), kind, shape, when=("moe",), join=join, stacked=stacked)

    up, down = ("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")
    turns, same, whole, flipped = Join.INTERLEAVED, Join.SAME, Stacked.EXPERTS, Stacked.TRANSPOSED
    return (
        row(f"{up[0]}.weight", up[1], Kind.GATED, flipped, turns, "expert_gated", "hidden"),
        row(f"{up[0]}.bias", f"{up[1]}_bias", Kind.GATED, whole, turns, "expert_gated"),
        row(f"{down[0]}.weight", down[1], Kind.ROW, flipped, same, "hidden", "expert_ffn"),
        row(f"{down[0]}.bias", f"{down[1]}_bias", Kind.REPLICATED, whole, same, "hidden"),
    )


GPT_OSS = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    config=llama_keys(
        positions=131072,
        epsilon=1e-5,
        theta=150000.0,
        num_query_groups=HfKey("num_key_value_heads", 8),
        kv_channels=HfKey("head_dim", 64),
        rope_scaling=rope_scaling,
        add_qkv_bias=HfKey("attention_bias", True),
        add_proj_bias=HfKey("attention_bias", True),
        layer_types=layer_types,
        sliding_window=HfKey("sliding_window", 128),
        num_experts=HfKey("num_local_experts"),
        moe_layers=every_layer,
        moe_ffn_hidden_size=HfKey("intermediate_size"),
        moe_router_topk=HfKey("num_experts_per_tok", 4),
    ),
    fixed={
        "attention_sinks": True,
        "add_mlp_bias": True,
        "activation": "clamped_swiglu",
        "moe_router_score": "softmax_topk",
        "moe_router_bias": True,
    },
    requires={"hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "rope_local_base_freq": None},
    weights=network_rows(
        layer_rows((sinks_row(), *attention_rows()), router_rows("mlp.router"), stacked_expert_rows())
    ),
    aliases=("gpt-oss",),
)
