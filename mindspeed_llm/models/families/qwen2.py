"""Qwen2 and Qwen2.5, dense: a Llama whose q, k and v have biases; its upper layers may slide.

Defaults are those of `transformers.Qwen2Config`. Upstream converts it as "llama2" with --add-qkv-bias.
"""

from mindspeed_llm.models.families.base import Family
from mindspeed_llm.models.families.keys import NOT_EXPRESSED, llama_keys, window_of_upper_layers
from mindspeed_llm.models.families.rows import LLAMA_ROWS

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    config=llama_keys(positions=32768, **window_of_upper_layers(window=4096, first=28)),
    fixed={"add_qkv_bias": True},
    requires=NOT_EXPRESSED,
    weights=LLAMA_ROWS,
    aliases=("qwen25", "qwen2.5"),
    converted_as=("llama2",),
)
