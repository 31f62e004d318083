"""Seed-OSS (36B): a Llama with a switch for each group of biases.

Defaults are those of `transformers.SeedOssConfig`. Its dropouts are for pre-training; models are tuned without.
"""

from mindspeed_llm.models.families.base import Family, HfKey
from mindspeed_llm.models.families.keys import NOT_EXPRESSED, llama_keys
from mindspeed_llm.models.families.rows import LLAMA_ROWS

SEED_OSS = Family(
    name="seed_oss",
    architectures=("SeedOssForCausalLM",),
    config=llama_keys(
        positions=524288,
        num_query_groups=HfKey("num_key_value_heads", 8),
        kv_channels=HfKey("head_dim", 128),
        add_qkv_bias=HfKey("attention_bias", True),
        add_proj_bias=HfKey("attention_out_bias", False),
        add_mlp_bias=HfKey("mlp_bias", False),
    ),
    fixed={},
    requires=NOT_EXPRESSED,
    weights=LLAMA_ROWS,
    aliases=("seed-oss",),
)
