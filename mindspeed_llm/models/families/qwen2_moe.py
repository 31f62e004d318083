"""Qwen1.5-MoE and Qwen2-MoE (A2.7B, 57B-A14B): experts, and one shared MLP behind a sigmoid gate.

Defaults are those of `transformers.Qwen2MoeConfig`.
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
    shared_expert_rows,
    sparse_layers,
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    config=llama_keys(
        positions=32768,
        num_query_groups=HfKey("num_key_value_heads", 16),
        add_qkv_bias=HfKey("qkv_bias", True),
        num_experts=either("num_experts", "num_local_experts"),
        moe_layers=sparse_layers,
        moe_ffn_hidden_size=HfKey("moe_intermediate_size", 1408),
        moe_shared_ffn_hidden_size=HfKey("shared_expert_intermediate_size", 5632),
        moe_router_topk=HfKey("num_experts_per_tok", 4),
        moe_router_norm_topk=HfKey("norm_topk_prob", False),
    ),
    fixed={"moe_shared_expert_gate": True},
    requires={**NOT_EXPRESSED, "use_sliding_window": False},
    weights=network_rows(
        layer_rows(
            GROUPED_ATTENTION,
            dense_rows(),
            router_rows(),
            expert_rows(),
            shared_expert_rows("mlp.shared_expert", gate="mlp.shared_expert_gate.weight"),
        )
    ),
    aliases=("qwen2-moe",),
)
