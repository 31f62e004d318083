"""GLM-4.5 and 4.6 (355B-A32B, Air): experts chosen by corrected sigmoid scores, shared experts, prediction layers.

Defaults are those of `transformers.Glm4MoeConfig`.
"""

from mindspeed_llm.models.families.base import Family, HfKey
from mindspeed_llm.models.families.keys import llama_keys
from mindspeed_llm.models.families.moe_rows import (
    GROUPED_ATTENTION,
    dense_rows,
    either,
    expert_rows,
    layer_rows,
    layers_after_dense,
    network_rows,
    prediction_rows,
    router_rows,
    shared_expert_rows,
    shared_size,
)

LAYER_ROWS = layer_rows(
    GROUPED_ATTENTION, dense_rows(), router_rows(), expert_rows(), shared_expert_rows("mlp.shared_experts")
)

GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    config=llama_keys(
        positions=131072,
        epsilon=1e-5,
        num_query_groups=HfKey("num_key_value_heads", 8),
        qk_layernorm=HfKey("use_qk_norm", False),
        add_qkv_bias=HfKey("attention_bias", False),
        rotary_percent=HfKey("partial_rotary_factor", 0.5),
        num_experts=either("n_routed_experts", "num_local_experts"),
        moe_layers=layers_after_dense(default=1),
        moe_ffn_hidden_size=HfKey("moe_intermediate_size", 1408),
        moe_shared_ffn_hidden_size=shared_size(default=1),
        moe_router_topk=HfKey("num_experts_per_tok", 8),
        moe_router_norm_topk=HfKey("norm_topk_prob", True),
        moe_router_scale=HfKey("routed_scaling_factor", 1.0),
        moe_router_groups=HfKey("n_group", 1),
        moe_router_group_topk=HfKey("topk_group", 1),
        mtp_num_layers=either("num_nextn_predict_layers", "num_mtp_layers", default=1),
    ),
    fixed={"moe_router_score": "sigmoid", "moe_expert_bias": True},
    requires={"hidden_act": "silu", "rope_local_base_freq": None},
    weights=network_rows(LAYER_ROWS, prediction_rows(LAYER_ROWS)),
    aliases=("glm45-moe",),
)
