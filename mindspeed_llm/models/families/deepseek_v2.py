"""DeepSeek-V2 and V2-Lite (236B-A21B, 16B-A2.4B): latent attention, softmax-scored experts, shared experts.

Defaults are those of `transformers.DeepseekV2Config`.
"""

from collections.abc import Mapping
from typing import Any

from mindspeed_llm.models.families.base import Family, HfKey
from mindspeed_llm.models.families.keys import llama_keys
from mindspeed_llm.models.families.moe_rows import (
    dense_rows,
    either,
    expert_rows,
    latent_attention_rows,
    latent_keys,
    layer_rows,
    layers_after_dense,
    network_rows,
    router_rows,
    shared_expert_rows,
    shared_size,
)


def groups(flat: Mapping[str, Any]) -> int:
    """Groups of experts; they count only where topk_method says so."""
    method = flat.get("topk_method") or "greedy"
    return flat["n_group"] if method == "group_limited_greedy" else 0


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    config=llama_keys(
        positions=2048,
        **latent_keys(),
        num_experts=either("n_routed_experts", "num_experts"),
        moe_layers=layers_after_dense(default=0),
        moe_ffn_hidden_size=HfKey("moe_intermediate_size", 1407),
        moe_shared_ffn_hidden_size=shared_size(default=2),
        moe_router_topk=HfKey("num_experts_per_tok"),
        moe_router_scale=HfKey("routed_scaling_factor", 1.0),
        moe_router_groups=groups,
        moe_router_group_topk=lambda flat: flat["topk_group"] if groups(flat) else 0,
    ),
    fixed={"rotary_interleaved": True, "moe_router_group_score": "max"},
    requires={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
    },
    weights=network_rows(
        layer_rows(
            latent_attention_rows(),
            dense_rows(),
            router_rows(),
            expert_rows(),
            shared_expert_rows("mlp.shared_experts"),
        )
    ),
    aliases=("deepseek2", "deepseek2-lite"),
)
