"""Qwen3-MoE (30B-A3B, 235B-A22B): a Qwen3 whose layers have experts, all of them or every few.

Defaults are those of `transformers.Qwen3MoeConfig`.
"""

from mindspeed_llm.models.families.base import Family, HfKey
from mindspeed_llm.models.families.keys import NOT_EXPRESSED, llama_keys
from mindspeed_llm.models.families.moe_rows import (
    GROUPED_ATTENTION,
    dense_rows,
    either,
    expert_rows,
    layer_rows,
    network_rows,
    router_rows,
    sparse_layers,
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    config=llama_keys(
        positions=32768,
        add_qkv_bias=HfKey("attention_bias", False),
        add_proj_bias=HfKey("attention_bias", False),
        num_query_groups=HfKey("num_key_value_heads", 4),
        num_experts=either("num_experts", "num_local_experts"),
        moe_layers=sparse_layers,
        moe_ffn_hidden_size=HfKey("moe_intermediate_size", 768),
        moe_router_topk=HfKey("num_experts_per_tok", 8),
        moe_router_norm_topk=HfKey("norm_topk_prob", False),
    ),
    fixed={"qk_layernorm": True},
    requires={**NOT_EXPRESSED, "use_sliding_window": False},
    weights=network_rows(layer_rows(GROUPED_ATTENTION, dense_rows(), router_rows(), expert_rows())),
    aliases=("qwen3-moe",),
    specs=("qwen3",),
)
