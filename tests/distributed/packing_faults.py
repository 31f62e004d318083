"""Faults in where packed rows end, planted to see the comparison notice them. Imports megatron-core."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mindspeed_llm.models.context import parts_of
from mindspeed_llm.models.packed import PackedRows, packed_rows

Place = tuple[int, int]


def bound_crossed(lengths: Sequence[int], positions: Sequence[int], device: Any, place: Place) -> PackedRows:
    """Planted fault: the second row sees the first; positions are right."""
    right = packed_rows(lengths, positions, device, place)
    joined = [lengths[0] + lengths[1], *lengths[2:]]
    if right.rows_cut is None:
        return replace(packed_rows(joined, positions, device), position_lengths=right.position_lengths)
    parts = parts_of(right.rows_cut.cut.runs[place[0]], joined, device)
    return replace(right, rows_cut=replace(right.rows_cut, parts=parts))


def bound_crossed_by_one(lengths: Sequence[int], positions: Sequence[int], device: Any, place: Place) -> PackedRows:
    """Planted fault: only the last context-parallel process lets the second row see the first."""
    rank, processes = place
    return (bound_crossed if rank == processes - 1 else packed_rows)(lengths, positions, device, place)


def reset_late(lengths: Sequence[int], positions: Sequence[int], device: Any, place: Place) -> PackedRows:
    """Planted fault: the second row's first token is still counted with the first row."""
    first, second, *others = positions
    return packed_rows(lengths, [first + 1, second - 1, *others], device, place)


PACKING_FAULTS = {
    "bound-crossed": bound_crossed,
    "bound-crossed-by-one": bound_crossed_by_one,
    "position-reset-late": reset_late,
}
