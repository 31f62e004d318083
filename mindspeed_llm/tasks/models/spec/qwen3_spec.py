"""Qwen3's decoder layer for megatron-core; `layer_spec` is made for this process's device when it is first read."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`layer_spec`: a megatron-core ModuleSpec. Importing this module alone touches no device."""
    if name != "layer_spec":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers layer_spec")
    from mindspeed_llm.device import select

    chosen = select()
    from mindspeed_llm.models.gpt import layer_spec

    return layer_spec(chosen, qk_layernorm=True)
