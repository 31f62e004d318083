"""Which rows share a sequence: upstream's greedy packing, in time that grows with rows, not with their square."""

from bisect import bisect_right
from collections.abc import Sequence


def greedy_packs(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows that go together, as lists of row numbers in the order in which they are laid down.

    Each pack takes the longest row left, then again and again the longest that still fits; of equally long rows the
    last comes first. Every length must be within 1..capacity.
    """
    waiting: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"row {row} of {length} tokens does not fit into packs of {capacity}")
        waiting.setdefault(length, []).append(row)
    distinct = sorted(waiting)
    packs: list[list[int]] = []
    while distinct:
        pack: list[int] = []
        room = capacity
        while (place := bisect_right(distinct, room)) > 0:
            length = distinct[place - 1]
            pack.append(waiting[length].pop())
            room -= length
            if not waiting[length]:
                distinct.pop(place - 1)
        packs.append(pack)
    return packs
