"""Which rows share a sequence.

Both ways fill one pack after the other, the longest row first and then again and again the longest that still fits.
`greedy_packs` is that alone, laid down in upstream's order; `pack_rows` looks for the row or the two that fill the
rest of a pack exactly, needs a few bytes per row, and shuffles. The time of both grows with the number of different
packs, not with that of the rows.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_ROWS = 1 << 16  # rows looked at at once


@dataclass(frozen=True)
class Packs:
    """Rows in the order in which they are laid down, and where each pack ends.

    Attributes:
        rows: [rows] int32, row numbers, pack after pack.
        ends: [packs] int32, position in `rows` behind each pack.
    """

    rows: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The row numbers of each pack."""
        begin = 0
        for end in self.ends.tolist():
            yield self.rows[begin:end]
            begin = end


def pack_rows(lengths: np.ndarray, capacity: int, seed: int) -> Packs:
    """Rows that go together, each pack within `capacity`; packs are in an order drawn from the seed.

    Args:
        lengths: [rows] tokens of each row, every one within 1..capacity.
        seed: decides the order of the packs and which of equally long rows go where; within a pack rows keep theirs.

    Raises:
        ValueError: a row that fits into no pack.
    """
    lengths = np.asarray(lengths)
    _check(lengths, capacity)
    random = np.random.default_rng(seed)
    counts = _counts(lengths)
    patterns = list(_patterns(counts, capacity, _filled))
    if not patterns:
        return Packs(np.zeros(0, np.int32), np.zeros(0, np.int32))
    # handed out to the patterns from the front
    by_length = _by_length(lengths, random)
    next_of = np.concatenate([[0], np.cumsum(counts)])
    sizes = np.repeat(
        np.array([sum(c for _, c in parts) for parts, _ in patterns], np.int32), [repeats for _, repeats in patterns]
    )
    rows = np.empty(len(lengths), np.int32)
    at = 0
    for parts, repeats in patterns:
        block = np.empty((repeats, sum(count for _, count in parts)), np.int32)
        column = 0
        for length, count in parts:
            first = next_of[length]
            block[:, column : column + count] = by_length[first : first + repeats * count].reshape(repeats, count)
            next_of[length] += repeats * count
            column += count
        block.sort(axis=1)
        rows[at : at + block.size] = block.ravel()
        at += block.size
    del by_length
    order = np.arange(len(sizes), dtype=np.int32)
    random.shuffle(order)
    return _reordered(rows, sizes, order)


def _counts(lengths: np.ndarray) -> np.ndarray:
    """[longest + 1] rows of each length; numpy would make eight bytes of every length at once."""
    counts = np.zeros(int(lengths.max(initial=0)) + 1, np.int64)
    for begin in range(0, len(lengths), BLOCK_ROWS):
        counts += np.bincount(lengths[begin : begin + BLOCK_ROWS], minlength=len(counts))
    return counts


def _by_length(lengths: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """[rows] int32, rows by length, equally long ones in random order; 16 bytes per row while it works."""
    shuffled = np.arange(len(lengths), dtype=np.int32)
    random.shuffle(shuffled)
    # length above, place in the random order below: sorted where they stand
    keys = lengths[shuffled].astype(np.int64)
    keys <<= 32
    for begin in range(0, len(keys), BLOCK_ROWS):
        part = keys[begin : begin + BLOCK_ROWS]
        part |= np.arange(begin, begin + len(part))
    keys.sort()
    for begin in range(0, len(keys), BLOCK_ROWS):
        part = keys[begin : begin + BLOCK_ROWS]
        part[:] = shuffled[part & 0xFFFFFFFF]
    return keys.astype(np.int32)


def greedy_packs(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows that go together, as lists of row numbers in the order in which they are laid down.

    Each pack takes the longest row left, then again and again the longest that still fits; of equally long rows the
    last comes first. Every length must be within 1..capacity.

    Raises:
        ValueError: a row that fits into no pack.
    """
    _check(np.asarray(lengths, np.int64), capacity)
    waiting: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        waiting.setdefault(length, []).append(row)
    packs: list[list[int]] = []
    counts = np.bincount(np.asarray(lengths, np.int64), minlength=1)
    for parts, repeats in _patterns(counts, capacity, _longest_first):
        for _ in range(repeats):
            packs.append([waiting[length].pop() for length, count in parts for _ in range(count)])
    return packs


def _check(lengths: np.ndarray, capacity: int) -> None:
    if len(lengths) >= 1 << 31:
        raise ValueError(f"{len(lengths)} rows are more than can be numbered; pack them in parts")
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if wrong.size:
        row = int(wrong[0])
        raise ValueError(f"row {row} of {int(lengths[row])} tokens does not fit into packs of {capacity}")


Pattern = list[tuple[int, int]]  # [(length, how many rows of it)], longest first


def _patterns(counts: np.ndarray, capacity: int, choose: "Choose") -> Iterator[tuple[Pattern, int]]:
    """Packs by the lengths in them, and how often that pack comes in a row.

    A pack comes again, with other rows, as long as there are rows enough of all its lengths: the choice depends on
    which lengths are left, not on how many.

    Args:
        counts: [longest + 1] rows of each length.
        choose: makes the next pack.
    """
    left = _Left(counts)
    while left.lengths:
        parts = choose(left, capacity)
        repeats = min(left.counts[length] // count for length, count in parts)
        yield parts, repeats
        for length, count in parts:
            left.take(length, repeats * count)


class _Left:
    """Rows that are not packed yet, by length.

    Attributes:
        counts: rows of each length.
        lengths: the lengths of which there are rows, ascending.
        single, double: [longest + 1] bool, whether at least one, two rows of a length are left.
    """

    def __init__(self, counts: np.ndarray) -> None:
        self.counts: list[int] = counts.tolist()
        self.lengths: list[int] = np.flatnonzero(counts).tolist()
        self.single = counts > 0
        self.double = counts > 1

    def take(self, length: int, count: int) -> None:
        """Remove rows of one length."""
        self.counts[length] -= count
        self.double[length] = self.counts[length] > 1
        if not self.counts[length]:
            self.single[length] = False
            self.lengths.pop(bisect_right(self.lengths, length) - 1)


Choose = Callable[[_Left, int], Pattern]


def _longest_first(left: _Left, capacity: int) -> Pattern:
    """The longest row, then again and again the longest that still fits."""
    parts: Pattern = []
    room, place = capacity, len(left.lengths)
    while (place := bisect_right(left.lengths, room, 0, place)) > 0:
        length = left.lengths[place - 1]
        count = min(room // length, left.counts[length])
        parts.append((length, count))
        room -= count * length
        place -= 1
    return parts


def _filled(left: _Left, capacity: int) -> Pattern:
    """The longest row, then again and again the longest that still fits, until one row or two fill the rest exactly."""
    parts = Counter([left.lengths[-1]])
    room = capacity - left.lengths[-1]
    while place := bisect_right(left.lengths, room):
        rest = _exact(left, room, parts)
        while not rest and place and parts[left.lengths[place - 1]] >= left.counts[left.lengths[place - 1]]:
            place -= 1  # all rows of this length are in this very pack
        if not rest and not place:
            break
        for length in rest or (left.lengths[place - 1],):
            parts[length] += 1
            room -= length
    return sorted(parts.items(), reverse=True)


def _exact(left: _Left, room: int, parts: Counter[int]) -> tuple[int, ...]:
    """One row or two that fill `room` to the token, the longest possible; empty when there are none."""
    longest = len(left.counts) - 1
    if room <= longest and left.counts[room] > parts[room]:
        return (room,)
    if room > 2 * longest:
        return ()
    high = min(room - 1, longest)
    # candidates for the longer one in descending order, each beside its partner
    longer = left.single[high : (room + 1) // 2 - 1 : -1] if room > 1 else left.single[:0]
    partner = left.single[room - high : room - high + len(longer)]
    both = longer & partner
    if room % 2 == 0 and len(both) and room // 2 <= longest:
        both[-1] = left.double[room // 2]
    for offset in np.flatnonzero(both)[:4].tolist():
        pair = (high - offset, room - high + offset)
        if all(left.counts[length] >= parts[length] + pair.count(length) for length in pair):
            return pair
    return ()


def _reordered(rows: np.ndarray, sizes: np.ndarray, order: np.ndarray) -> Packs:
    """The packs of `sizes` rows each that stand one after the other in `rows`, in another order."""
    moved = np.cumsum(sizes, dtype=np.int32)
    moved -= sizes
    moved, sizes = moved[order], sizes[order]
    ends = np.cumsum(sizes, dtype=np.int32)
    moved -= ends
    moved += sizes
    # where every row stood: its new place, and how far its pack has moved
    places = np.repeat(moved, sizes)
    for begin in range(0, len(places), BLOCK_ROWS):
        part = places[begin : begin + BLOCK_ROWS]
        part += np.arange(begin, begin + len(part), dtype=np.int32)
    return Packs(rows[places], ends)
