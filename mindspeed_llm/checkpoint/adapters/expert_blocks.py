"""peft's form of adapters on experts that transformers holds in one parameter: a pair of factors for all of them.

Sizes: E experts, r rank of one of them, O and I a weight's rows and columns.

    lora_A [E * r, I]   expert e has rows e * r to (e + 1) * r
    lora_B [O, r * E]   expert e has columns e, E + e, 2 * E + e ... (the rank is the outer number)

The wrappers of several parameters lie around one another: the last parameter's is outermost and has the module's own
name, each one before it is its `base_layer`.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from mindspeed_llm.checkpoint.adapters.factors import Pair
from mindspeed_llm.checkpoint.adapters.peft_config import PeftConfig
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, contiguous_stride
from mindspeed_llm.checkpoint.kinds import AxisMap, Segment
from mindspeed_llm.checkpoint.tables import Entry, WeightTable
from mindspeed_llm.errors import InputError

PARAMETERS = {"gate_up_proj": "linear_fc1", "down_proj": "linear_fc2"}
"""transformers' names of the experts' parameters, in the order of their modules, and megatron-core's."""
LAYER = re.compile(r"\blayers\.(\d+)\.")


class ExpertBlock(NamedTuple):
    """One parameter's pair of factors, still for all experts of a layer."""

    module: str
    parameter: str
    entries: list[Entry]
    a: LazyTensor
    b: LazyTensor


def container(module: str) -> str:
    """The module that holds the experts, without peft's wrappers."""
    return re.sub(r"(\.base_layer)+$", "", module)


def expert_entries(table: WeightTable, module: str, short: str) -> list[Entry]:
    """The entries of the experts' `short` weights in the layer of an HF module, by number; empty when it has none."""
    layer = LAYER.search(module)
    found = table.of_layer.get(int(layer[1]), []) if layer and module.endswith(".experts") else []
    return [entry for entry in found if entry.expert is not None and entry.name.endswith(f".{short}.weight")]


def find_blocks(
    factors: Mapping[str, Mapping[str, LazyTensor]], config: PeftConfig, table: WeightTable
) -> dict[str, ExpertBlock]:
    """The blocks of an adapter file, by the name under which they lie in it.

    Raises:
        InputError: wrappers and `target_parameters` do not agree.
    """
    found: dict[str, ExpertBlock] = {}
    wrapped = {container(module) for module in factors}
    for module in sorted(one for one in wrapped if expert_entries(table, one, "linear_fc1")):
        targeted = [name for name in PARAMETERS if config.targets_parameter(f"{module}.{name}")]
        names = [module + ".base_layer" * (len(targeted) - 1 - depth) for depth in range(len(targeted))]
        stored = sorted(one for one in factors if container(one) == module)
        if stored != sorted(names):
            raise InputError(
                f"{config.path}: target_parameters names {targeted or 'nothing'} of {module}, the file holds"
                f" {', '.join(stored)}"
            )
        for name, parameter in zip(names, targeted, strict=True):
            own = factors[name]
            if set(own) != {"lora_A", "lora_B"}:
                raise InputError(f"{config.path.parent}: {name} has {', '.join(sorted(own))}, expected lora_A, lora_B")
            entries = expert_entries(table, module, PARAMETERS[parameter])
            found[name] = ExpertBlock(module, parameter, entries, own["lora_A"], own["lora_B"])
    return found


def expert_pairs(block: ExpertBlock, config: PeftConfig) -> list[tuple[Entry, AxisMap, Pair]]:
    """Each expert's pair; the map says where the parameter's rows lie in the logical weight.

    Raises:
        InputError: the factors' shapes do not fit the experts, or another rank is recorded.
    """
    count = len(block.entries)
    key = f"{block.module}.{block.parameter}"
    rank, rows, columns = config.rank(key), block.entries[0].shape[0], block.entries[0].shape[1]
    wanted = (rank * count, columns), (rows, rank * count)
    if (block.a.shape, block.b.shape) != wanted:
        raise InputError(
            f"{config.path.parent}: {key} has lora_A {list(block.a.shape)} and lora_B {list(block.b.shape)}; {count}"
            f" experts of rank {rank} have {list(wanted[0])} and {list(wanted[1])}"
        )
    axis = joined_parts(block.entries[0].hf_map())
    scaling = config.scaling(key)
    return [
        (entry, axis, Pair(a_of(block.a, number, rank), b_of(block.b, number, count), scaling))
        for number, entry in enumerate(block.entries)
    ]


def a_of(block: LazyTensor, expert: int, rank: int) -> LazyTensor:
    """One expert's A [r, I] within a block."""
    down, across = block.stride or contiguous_stride(block.shape)
    offset = block.offset + expert * rank * down * block.dtype.itemsize
    return LazyTensor(block.path, offset, block.dtype, (rank, block.shape[1]), (down, across))


def b_of(block: LazyTensor, expert: int, count: int) -> LazyTensor:
    """One expert's B [O, r] within a block."""
    down, across = block.stride or contiguous_stride(block.shape)
    offset = block.offset + expert * across * block.dtype.itemsize
    return LazyTensor(
        block.path, offset, block.dtype, (block.shape[0], block.shape[1] // count), (down, across * count)
    )


def blocks_of(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A and lora_B of a parameter from its experts' pairs, all of one rank."""
    a = torch.cat([one for one, _ in pairs])
    b = torch.stack([one for _, one in pairs], dim=-1)  # [O, r, E]
    return a, b.flatten(1)


def joined_parts(axis: AxisMap) -> AxisMap:
    """The map of one tensor that holds the parts of `axis` below one another."""
    above = [sum(axis.part_size(earlier) for earlier in range(part)) for part in range(axis.parts)]
    moved = tuple(Segment(0, above[one.part] + one.start, one.length) for one in axis.segments)
    return AxisMap(0, moved, (0,))
