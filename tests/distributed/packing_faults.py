"""Faults in where packed rows end, planted to see the comparison notice them. Imports megatron-core."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mindspeed_llm.models.packed import PackedRows, packed_rows


def bound_crossed(lengths: Sequence[int], position_lengths: Sequence[int], device: Any) -> PackedRows:
    """Planted fault: the second row sees the first; positions are right."""
    joined = packed_rows([lengths[0] + lengths[1], *lengths[2:]], position_lengths, device)
    return replace(joined, position_lengths=tuple(position_lengths))


def reset_late(lengths: Sequence[int], position_lengths: Sequence[int], device: Any) -> PackedRows:
    """Planted fault: the second row's first token is still counted with the first row."""
    first, second, *others = position_lengths
    return packed_rows(lengths, [first + 1, second - 1, *others], device)


PACKING_FAULTS = {"bound-crossed": bound_crossed, "position-reset-late": reset_late}
