"""A base and its adapter, opened alike by training, inference and evaluation, and by all their ranks together."""

from typing import Any

import torch
from torch import nn

from mindspeed_llm.arguments.lora import LoraOptions
from mindspeed_llm.checkpoint.adapters.factors import AdapterTensors
from mindspeed_llm.checkpoint.adapters.replaced import SourceTensor
from mindspeed_llm.checkpoint.adapters.settings import ROUTER, TOKENS
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.formats.lazy import TensorSource
from mindspeed_llm.checkpoint.layout import ExpertShare
from mindspeed_llm.checkpoint.live import live_tensors, load_live
from mindspeed_llm.checkpoint.metadata import short_name
from mindspeed_llm.checkpoint.open import BaseSource, check_base, open_base, open_lora, source_hash
from mindspeed_llm.checkpoint.tables import OUTPUT_LAYER, logical_name
from mindspeed_llm.lora.config import check_given


def open_pair(load: str, options: LoraOptions, family_name: str | None) -> tuple[BaseSource, LoraSource]:
    """The base in `load` and the adapter of --lora-load, a Megatron checkpoint or a PEFT folder; collective.

    Raises:
        UsageError: a flag contradicts the adapter.
        InputError: nothing there, or an adapter of another base.
    """
    base = open_base(load, family_name, with_adapter=True)
    adapter = open_lora(options.lora_load or "", options.lora_r, options.lora_alpha, family_name=family_name, base=base)
    check_given(adapter.live_settings, options, base.table, adapter.path)
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
    others = [
        module
        for module in adapter.modules()
        if not (short_name(module).startswith("linear_") or short_name(module) in (ROUTER, TOKENS, "output_layer"))
    ]
    return [*adapter.obstacles(), *(f"an adapter of {module}" for module in others)]


def load_adapter(
    chunk: nn.Module, adapter: LoraSource, tp_rank: int, tp_size: int, experts: ExpertShare | None = None
) -> None:
    """Fill an adapted model chunk with its share of an adapter: LoRA tensors, and modules that are trained whole.

    Raises:
        InputError: the adapter does not fit the model.
    """
    live, source = live_tensors(chunk), adapter.live
    load_live(live, source, tp_rank, tp_size, chunk.first_layer, experts=experts)
    first = experts.first if experts else 0
    replaced = set(adapter.whole())
    table = source.table
    whole = {
        local: tensor
        for local, tensor in live.items()
        if table.resolve(logical_name(local, chunk.first_layer, first_expert=first)) in replaced
    }
    if whole:
        tensors = {name: SourceTensor(source, name) for name in adapter.whole()}
        if (head := table.resolve(OUTPUT_LAYER)) in tensors:  # the last stage has a copy of a tied embedding
            tensors[OUTPUT_LAYER] = tensors[head]
        own = AdapterTensors(adapter.path, table, tensors)
        load_live(whole, own, tp_rank, tp_size, chunk.first_layer, experts=experts)
