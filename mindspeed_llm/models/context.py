"""Context parallelism (CP): a sequence cut over processes, and attention over all of it.

A sequence of s tokens is cut into 2 c pieces for c processes; process i has pieces i and 2 c - 1 - i. Under a causal
mask late tokens cost more than early ones, and so every process gets as much of both ("zig-zag"). Rows that stand one
behind the other in a sequence are cut each for itself, as far as they are long (`zigzag_rows`).

    queries stay            keys and values are gathered, a run of the queries sees those of its row up to its end
    gradients of keys and values are summed over the processes and scattered back

Shapes: s sequence, b batch, n query heads, g key-value heads, d head dimension; `/c` = divided by CP.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from mindspeed_llm.device.segments import Segments

Span = tuple[int, int]
"""Positions of the whole sequence: first, and first no more."""
ALONE = 1024
"""Tokens beyond which a row is cut for itself: the attention of shorter ones is a few percent of a layer's work."""


@dataclass(frozen=True)
class Cut:
    """Which positions of a sequence each process has.

    Attributes:
        runs: for each process its spans, ascending; all have equally many tokens, and every position is in one.
    """

    runs: tuple[tuple[Span, ...], ...]

    def own(self, whole: Tensor, dim: int, rank: int) -> Tensor:
        """Process `rank`'s part of a tensor that is whole in `dim`."""
        return torch.cat([whole.narrow(dim, begin, end - begin) for begin, end in self.runs[rank]], dim)

    @cached_property
    def gathered(self) -> tuple[tuple[Span, int], ...]:
        """(span, where it begins among the tokens as processes gather them, process after process), ascending."""
        found, place = [], 0
        for begin, end in (span for runs in self.runs for span in runs):
            found.append(((begin, end), place))
            place += end - begin
        return tuple(sorted(found))

    def in_order(self, gathered: Tensor) -> Tensor:
        """[s, ...] as processes gathered it, process after process, in the order of positions."""
        return torch.cat([gathered[place : place + end - begin] for (begin, end), place in self.gathered])

    def by_process(self, ordered: Tensor) -> Tensor:
        """The inverse of `in_order`."""
        return torch.cat([ordered[begin:end] for runs in self.runs for begin, end in runs])


@dataclass(frozen=True)
class Part:
    """Queries of a process that are computed in one call, and the keys they see.

    Attributes:
        queries: positions among the process's own. keys: positions of the whole sequence; the queries are the last.
        segments: rows in the part, which begin and end with it; None for one row or a part of one.
    """

    queries: Span
    keys: Span
    segments: Segments | None = None


@dataclass(frozen=True)
class RowsCut:
    """Rows one behind the other, cut over processes.

    Attributes:
        cut: of the whole sequence.
        parts: what this process computes, in its own order.
    """

    cut: Cut
    parts: tuple[Part, ...]


def pieces(rank: int, size: int) -> tuple[int, int]:
    """The numbers of a process's two pieces, of 2 x `size`."""
    return rank, 2 * size - 1 - rank


def zigzag(length: int, size: int) -> Cut:
    """A sequence cut over `size` processes, each with an early and a late piece."""
    return _divided([(0, length)], length, size)


def zigzag_rows(lengths: Sequence[int], size: int) -> Cut:
    """Rows one behind the other, cut over `size` processes so that all have as many tokens and alike much attention.

    A long row gives every process two pieces of the same length, an early and a late one. Its last tokens, fewer than
    2 x `size`, and the short rows are cut as one sequence.

    Args:
        lengths: of the rows; their sum divides by 2 x `size`.
    """
    total, start = sum(lengths), 0
    _check_divides(total, size)
    runs: list[list[Span]] = [[] for _ in range(size)]
    rest: list[Span] = []
    for length in lengths:
        whole = length - length % (2 * size) if length > min(ALONE, total // (2 * size)) else 0
        for spans, found in zip(runs, _divided([(start, start + whole)], whole, size).runs, strict=True):
            spans.extend(found)
        rest.append((start + whole, start + length))
        start += length
    for spans, found in zip(runs, _divided(rest, sum(b - a for a, b in rest), size).runs, strict=True):
        spans.extend(_joined(found))
    return Cut(tuple(tuple(sorted(spans)) for spans in runs))


def _divided(spans: Sequence[Span], length: int, size: int) -> Cut:
    """Spans of `length` tokens in all as one sequence, cut over `size` processes."""
    _check_divides(length, size)
    piece = length // (2 * size)
    parts = [tuple(_within(spans, number * piece, (number + 1) * piece)) for number in range(2 * size)]
    return Cut(tuple(tuple(span for number in pieces(rank, size) for span in parts[number]) for rank in range(size)))


def _check_divides(length: int, size: int) -> None:
    """Raise ValueError unless a sequence can be cut into pieces of one length."""
    if length % (2 * size):
        raise ValueError(f"a sequence of {length} cannot be cut into 2 x {size} pieces")


def _within(spans: Iterable[Span], first: int, last: int) -> Iterable[Span]:
    """The tokens numbered `first` to `last` of all the spans' tokens."""
    before = 0
    for begin, end in spans:
        start, stop = max(begin, begin + first - before), min(end, begin + last - before)
        if start < stop:
            yield start, stop
        before += end - begin


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Spans in order, those that touch made one."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and found[-1][1] == begin:
            found[-1] = found[-1][0], end
        else:
            found.append((begin, end))
    return tuple(found)


def parts_of(runs: Sequence[Span], lengths: Sequence[int], device: torch.device) -> tuple[Part, ...]:
    """What a process with these runs of a sequence computes, where the sequence is rows of these lengths.

    Rows that it has whole, one behind the other, are one part: devices have kernels for those.
    """
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = list(zip([0, *ends[:-1]], ends, strict=True))
    parts: list[Part] = []
    place = 0  # of a run among the process's own tokens
    for begin, end in runs:
        whole: list[Span] = []
        for first, last in rows:
            start, stop = max(begin, first), min(end, last)
            if start >= stop:
                continue
            if start == first:  # sees its own tokens only
                whole.append((start, stop))
            else:
                parts.append(Part((place + start - begin, place + stop - begin), (first, stop)))
        if whole:
            span = whole[0][0], whole[-1][1]
            queries = place + span[0] - begin, place + span[1] - begin
            parts.append(Part(queries, span, _segments(whole, device)))
        place += end - begin
    return tuple(parts)


def _segments(spans: Sequence[Span], device: torch.device) -> Segments | None:
    """Spans that touch as segments of one sequence; None of a single one."""
    if len(spans) == 1:
        return None
    bounds = [spans[0][0], *(end for _, end in spans)]
    placed = torch.tensor([bound - bounds[0] for bound in bounds], dtype=torch.int32).to(device)
    return Segments(tuple(end - begin for begin, end in spans), placed)


def own_positions(whole: Tensor | None, dim: int, group: ProcessGroup | None, cut: Cut | None = None) -> Tensor | None:
    """This process's part of a tensor that every process has whole; None of None.

    Args:
        whole: its dimension `dim` runs over the sequence and divides by twice the group's size.
        group: of context parallelism; None or one process for no cut.
        cut: of the sequence; None for an early and a late piece.
    """
    if whole is None or group is None or group.size() == 1:
        return whole
    return (cut or zigzag(whole.size(dim), group.size())).own(whole, dim, group.rank())


class _Whole(torch.autograd.Function):
    """[s/c, ...] of each process -> [s, ...] in the order of positions; backward sums over processes and scatters."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup, cut: Cut) -> Tensor:
        ctx.group, ctx.cut = group, cut
        gathered = own.new_empty(own.size(0) * group.size(), *own.shape[1:])
        distributed.all_gather_into_tensor(gathered, own.contiguous(), group=group)
        return cut.in_order(gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own = grad.new_empty(grad.size(0) // ctx.group.size(), *grad.shape[1:])
        distributed.reduce_scatter_tensor(own, ctx.cut.by_process(grad), group=ctx.group)
        return own, None, None


def attend(
    kernel: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: ProcessGroup,
    rows: RowsCut | None = None,
    **features: Any,
) -> Tensor:
    """Causal attention of this process's queries to the whole sequence, or to the rows they belong to.

    Args:
        kernel: `device.kernels.sdpa` or the like: queries are the last of the keys' positions.
        query: [s/c, b, n, d]; key: [s/c, b, g, d]; value: [s/c, b, g, v].
        rows: where the sequence is rows that do not see each other, b = 1; None for one sequence.
        features: of the kernel (scale, window, sinks ...).

    Returns:
        [s/c, b, n, v].
    """
    if rows is None:
        cut = zigzag(query.size(0) * group.size(), group.size())
        rows = RowsCut(cut, _seeing_all_before(cut.runs[group.rank()]))
    both = _Whole.apply(torch.cat([key, value], -1), group, rows.cut)
    out = []
    for part in rows.parts:
        keys, values = both[slice(*part.keys)].split([key.size(-1), value.size(-1)], -1)
        heads_first = (one.permute(1, 2, 0, 3) for one in (query[slice(*part.queries)], keys, values))
        out.append(kernel(*heads_first, segments=part.segments, **features).permute(2, 0, 1, 3))
    return torch.cat(out)


def _seeing_all_before(runs: Sequence[Span]) -> tuple[Part, ...]:
    """The parts of a process's runs of one sequence."""
    parts, place = [], 0
    for begin, end in runs:
        parts.append(Part((place, place + end - begin), (0, end)))
        place += end - begin
    return tuple(parts)
