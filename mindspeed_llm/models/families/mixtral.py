"""Mixtral (8x7B, 8x22B): a Mistral whose layers have experts.

Defaults are those of `transformers.MixtralConfig`.
"""

from mindspeed_llm.models.families.base import Family, HfKey
from mindspeed_llm.models.families.keys import NOT_EXPRESSED, llama_keys, window_of_every_layer
from mindspeed_llm.models.families.moe_rows import (
    GROUPED_ATTENTION,
    every_layer,
    expert_rows,
    layer_rows,
    network_rows,
    router_rows,
)

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    config=llama_keys(
        positions=131072,
        epsilon=1e-5,
        theta=1000000.0,
        num_query_groups=HfKey("num_key_value_heads", 8),
        num_experts=HfKey("num_local_experts", 8),
        moe_layers=every_layer,
        moe_ffn_hidden_size=HfKey("intermediate_size"),
        moe_router_topk=HfKey("num_experts_per_tok", 2),
        **window_of_every_layer(default=None),
    ),
    fixed={"moe_router_norm_topk": True},
    requires={**NOT_EXPRESSED, "layer_types": None},
    weights=network_rows(
        layer_rows(
            GROUPED_ATTENTION,
            router_rows("block_sparse_moe.gate"),
            expert_rows("block_sparse_moe.experts", ("w1", "w3", "w2")),
        )
    ),
)
