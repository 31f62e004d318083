"""Mistral (7B, Nemo, Small): a Llama in which all layers slide (v0.1) or none does (sliding_window null).

Defaults are those of `transformers.MistralConfig`.
"""

from mindspeed_llm.models.families.base import Family, HfKey
from mindspeed_llm.models.families.keys import NOT_EXPRESSED, llama_keys, window_of_every_layer
from mindspeed_llm.models.families.rows import LLAMA_ROWS

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    config=llama_keys(
        positions=131072, num_query_groups=HfKey("num_key_value_heads", 8), **window_of_every_layer(default=4096)
    ),
    fixed={},
    requires={**NOT_EXPRESSED, "layer_types": None},
    weights=LLAMA_ROWS,
    aliases=("magistral",),
    converted_as=("llama2",),
)
