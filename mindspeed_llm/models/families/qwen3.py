"""Qwen3, dense (0.6B to 32B): grouped-query attention with normalised q and k, gated SiLU MLP.

Tied (0.6B, 1.7B, 4B) and untied. Defaults are those of `transformers.Qwen3Config`.
"""

from mindspeed_llm.models.families.base import Family, HfKey
from mindspeed_llm.models.families.keys import NOT_EXPRESSED, llama_keys, window_of_upper_layers
from mindspeed_llm.models.families.rows import LLAMA_ROWS

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    config=llama_keys(
        positions=32768,
        kv_channels=HfKey("head_dim", 128),
        add_qkv_bias=HfKey("attention_bias", False),
        add_proj_bias=HfKey("attention_bias", False),
        **window_of_upper_layers(window=4096, first=28),
    ),
    fixed={"qk_layernorm": True},
    requires=NOT_EXPRESSED,
    weights=LLAMA_ROWS,
)
