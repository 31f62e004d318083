"""Llama 2, 3, 3.1, 3.2, Code Llama and what shares their architecture.

Defaults are those of `transformers.LlamaConfig`.
"""

from mindspeed_llm.models.families.base import Family, HfKey
from mindspeed_llm.models.families.keys import NOT_EXPRESSED, llama_keys
from mindspeed_llm.models.families.rows import LLAMA_ROWS

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    config=llama_keys(
        positions=2048,
        add_qkv_bias=HfKey("attention_bias", False),
        add_proj_bias=HfKey("attention_bias", False),
        add_mlp_bias=HfKey("mlp_bias", False),
    ),
    fixed={},
    requires=NOT_EXPRESSED,
    weights=LLAMA_ROWS,
    aliases=("llama2", "llama3", "llama31", "llama32", "codellama"),
)
