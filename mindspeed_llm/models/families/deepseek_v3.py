"""DeepSeek-V3 and R1 (671B-A37B): latent attention, experts chosen by corrected sigmoid scores, prediction layers.

Defaults are those of `transformers.DeepseekV3Config`.
"""

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
    prediction_rows,
    router_rows,
    shared_expert_rows,
    shared_size,
)

LAYER_ROWS = layer_rows(
    latent_attention_rows(), dense_rows(), router_rows(), expert_rows(), shared_expert_rows("mlp.shared_experts")
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    config=llama_keys(
        positions=4096,
        **latent_keys(),
        rotary_interleaved=HfKey("rope_interleave", True),
        num_experts=either("n_routed_experts", "num_local_experts"),
        moe_layers=layers_after_dense(default=3),
        moe_ffn_hidden_size=HfKey("moe_intermediate_size", 2048),
        moe_shared_ffn_hidden_size=shared_size(default=1),
        moe_router_topk=HfKey("num_experts_per_tok", 8),
        moe_router_norm_topk=HfKey("norm_topk_prob", True),
        moe_router_scale=HfKey("routed_scaling_factor", 2.5),
        moe_router_groups=HfKey("n_group", 8),
        moe_router_group_topk=HfKey("topk_group", 4),
        mtp_num_layers=either("num_nextn_predict_layers", "num_mtp_layers", default=1),
    ),
    fixed={"moe_router_score": "sigmoid", "moe_expert_bias": True},
    requires={
        "hidden_act": "silu",
        "attention_bias": False,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    weights=network_rows(LAYER_ROWS, prediction_rows(LAYER_ROWS)),
    aliases=("deepseek3",),
)
