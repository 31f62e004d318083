"""A base and its adapter, opened alike by training, inference and evaluation, and by all their ranks together."""

from typing import Any

import torch

from mindspeed_llm.arguments.lora import LoraOptions
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.formats.lazy import TensorSource
from mindspeed_llm.checkpoint.metadata import short_name
from mindspeed_llm.checkpoint.open import BaseSource, check_base, open_base, open_lora, source_hash


def open_pair(load: str, options: LoraOptions, family_name: str | None) -> tuple[BaseSource, LoraSource]:
    """The base in `load` and the adapter of --lora-load, a Megatron checkpoint or a PEFT folder; collective.

    Raises:
        UsageError: a flag contradicts the adapter.
        InputError: nothing there, or an adapter of another base.
    """
    base = open_base(load, family_name, with_adapter=True)
    given = (options.lora_r, options.lora_alpha, options.lora_target_modules)
    adapter = open_lora(options.lora_load or "", *given, family_name=family_name, base=base)
    check_base(adapter, base, load, shared_hash)
    return base, adapter


def shared_hash(base: TensorSource) -> str:
    """The content hash of a base on every rank. Rank 0 alone reads the weights for it; collective."""
    if not torch.distributed.is_initialized():
        return source_hash(base)
    shared: list[Any] = [source_hash(base) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def live_obstacles(adapter: LoraSource) -> list[str]:
    """What of an adapter has no place in the live model's adapters; empty when all of it has."""
    others = [module for module in adapter.modules() if not short_name(module).startswith("linear_")]
    return [*adapter.obstacles(), *(f"an adapter of {module}" for module in others)]
