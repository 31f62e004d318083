"""Qwen3's decoder layer for megatron-core; `layer_spec` is made for this process's device when it is first read."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`layer_spec`: a megatron-core ModuleSpec. Importing this module alone touches no device."""
    if name != "layer_spec":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers layer_spec")
    from mindspeed_llm.device import select

    chosen = select()
    from mindspeed_llm.models.config import ModelConfig
    from mindspeed_llm.models.families.qwen3 import QWEN3
    from mindspeed_llm.models.layer import layer_spec

    # The specification holds no size: megatron-core takes them from its own configuration when it builds the layer.
    sizes = {"num_layers": 36, "hidden_size": 4096, "ffn_hidden_size": 12288, "kv_channels": 128}
    heads = {"num_attention_heads": 32, "num_query_groups": 8, "vocab_size": 151936, "max_position_embeddings": 40960}
    scalars = {"rotary_base": 1e6, "norm_epsilon": 1e-6, "tie_word_embeddings": False, "dtype": "bfloat16"}
    return layer_spec(ModelConfig(family=QWEN3.name, **sizes, **heads, **scalars, **QWEN3.fixed), 0, chosen)
