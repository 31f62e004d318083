"""From a source straight into the parameters of a live model: every rank reads only its own slices."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mindspeed_llm.checkpoint.formats.lazy import InMemory, TensorSource, part_of
from mindspeed_llm.checkpoint.formats.mcore_names import local_shape
from mindspeed_llm.checkpoint.kinds import AxisMap
from mindspeed_llm.checkpoint.layout import ExpertShare
from mindspeed_llm.checkpoint.tables import (
    EMBEDDING,
    LAYER_NUMBER,
    OUTPUT_LAYER,
    WeightTable,
    expert_number,
    is_lora,
    logical_name,
)
from mindspeed_llm.errors import InputError


@dataclass(frozen=True)
class Loaded:
    """What was read into a live model: how many tensors, and their local bytes."""

    tensors: int
    nbytes: int


def live_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a live module by name: what a checkpoint holds of it."""
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters())
    for prefix, one in module.named_modules():
        for name, buffer in one.named_buffers(recurse=False):
            if name not in one._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors


def load_live(
    named_tensors: Mapping[str, torch.Tensor],
    source: TensorSource,
    tp_rank: int = 0,
    tp_size: int = 1,
    first_layer: int = 0,
    adapter: str = "default",
    experts: ExpertShare | None = None,
) -> Loaded:
    """Copy this rank's share of every tensor into a live model's parameters.

    A source with LoRA factors fills the LoRA parameters, any other the rest; values are cast to the parameter's type.

    Args:
        named_tensors: local tensors of one chunk by local name (`live_tensors`, however wrapped).
        first_layer: global number of the chunk's layer 0.
        adapter: peft's adapter name.
        experts: this rank's experts; None for all, cut like everything else.

    Raises:
        InputError: listing parameters the source lacks, tensors of these layers that the model lacks, and shapes that
            differ; nothing is copied then.
    """
    wants_lora = any(is_lora(name) for name in source.names())
    experts = experts or ExpertShare(0, source.config.num_experts, tp_rank, tp_size)
    live = {logical_name(name, first_layer, adapter, experts.first): one for name, one in named_tensors.items()}
    layers = {match[0] for name in live if (match := LAYER_NUMBER.search(name))}
    live = {name: tensor for name, tensor in live.items() if is_lora(name) == wants_lora}
    axes: dict[str, AxisMap] = {}
    ranks: dict[str, int] = {}
    wrong = names_that_differ(live, source, experts, layers)
    stored = set(source.names())
    for name, tensor in live.items():
        if source.table.resolve(name) not in stored:
            continue
        of_expert = expert_number(name) is not None
        ranks[name], size = (experts.part, experts.parts) if of_expert else (tp_rank, tp_size)
        axes[name] = live_axis(source.table, name, tensor, size)
        share = local_shape(source.shape(name), axes[name], ranks[name])
        if tuple(tensor.shape) != share:
            cut = f"{'E' if of_expert else ''}TP{size}"
            wrong.append(f"{name}: the model has {list(tensor.shape)}, the checkpoint {list(share)} for {cut}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(
            f"{getattr(source, 'path', 'checkpoint')}: does not fit the model: {'; '.join(wrong[:5])}{more}"
        )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(part_of(functools.partial(source.read, name), axes[name], ranks[name]))
    return Loaded(len(live), sum(tensor.nbytes for tensor in live.values()))


def names_that_differ(
    live: Mapping[str, torch.Tensor], source: TensorSource, experts: ExpertShare, layers: set[str]
) -> list[str]:
    """Messages for parameters the source lacks and for tensors of the live `layers` that the model lacks.

    Experts of other ranks and prediction layers, which the live model does not have, are not missed; nor are factors
    in a chunk without any layer that is adapted.
    """
    held = (None, *range(experts.first, experts.first + experts.count))
    stored = set(source.names())
    wrong = [f"{name} is not in the checkpoint" for name in live if source.table.resolve(name) not in stored]
    factors = any(map(is_lora, stored))
    for name in source.names():
        if factors and not is_lora(name):
            continue
        match = LAYER_NUMBER.search(name)
        if match and match[0] in layers and name not in live and expert_number(name) in held:
            wrong.append(f"{name} is not in the model")
    if not live and (wrong or not factors):
        return ["the model has none of its tensors"]
    return wrong


def live_axis(table: WeightTable, name: str, tensor: torch.Tensor, tp_size: int) -> AxisMap:
    """How ranks share a live parameter; a vocabulary's padding is what the live table has."""
    padded = tensor.shape[0] * tp_size if table.resolve(name) in (EMBEDDING, OUTPUT_LAYER) else None
    return table.shard_map(name, tp_size, padded)


def local_slice(
    table: WeightTable, name: str, logical: torch.Tensor, tp_size: int, tp_rank: int, padded_rows: int | None = None
) -> torch.Tensor:
    """One rank's share of an unsharded tensor (a parameter, its gradient or optimizer state)."""
    return part_of(InMemory(logical).read, table.shard_map(name, tp_size, padded_rows), tp_rank)
