"""Context parallelism (CP): a sequence cut over processes, and attention over all of it.

A sequence of s tokens is cut into 2 c pieces for c processes; process i has pieces i and 2 c - 1 - i. Under a causal
mask late tokens cost more than early ones, and so every process gets as much of both ("zig-zag").

    queries stay            keys and values are gathered, piece i of the queries sees pieces 0..i of them
    gradients of keys and values are summed over the processes and scattered back

Shapes: s sequence, b batch, n query heads, g key-value heads, d head dimension; `/c` = divided by CP.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


def pieces(rank: int, size: int) -> tuple[int, int]:
    """The numbers of a process's two pieces, of 2 x `size`."""
    return rank, 2 * size - 1 - rank


def own_positions(whole: Tensor | None, dim: int, group: ProcessGroup | None) -> Tensor | None:
    """This process's part of a tensor that every process has whole; None of None.

    Args:
        whole: its dimension `dim` runs over the sequence and divides by twice the group's size.
        group: of context parallelism; None or one process for no cut.
    """
    if whole is None or group is None or group.size() == 1:
        return whole
    if whole.size(dim) % (2 * group.size()):
        raise ValueError(f"a sequence of {whole.size(dim)} cannot be cut into 2 x {group.size()} pieces")
    parts = whole.chunk(2 * group.size(), dim)
    return torch.cat([parts[number] for number in pieces(group.rank(), group.size())], dim)


def in_order(gathered: Tensor, size: int) -> Tensor:
    """[s, ...] as processes gathered it, process after process, in the order of positions."""
    found = [None] * (2 * size)
    for rank, both in enumerate(gathered.chunk(size)):
        for number, piece in zip(pieces(rank, size), both.chunk(2), strict=True):
            found[number] = piece
    return torch.cat(found)


def by_process(ordered: Tensor, size: int) -> Tensor:
    """The inverse of `in_order`."""
    parts = ordered.chunk(2 * size)
    return torch.cat([parts[number] for rank in range(size) for number in pieces(rank, size)])


class _Whole(torch.autograd.Function):
    """[s/c, ...] of each process -> [s, ...] in the order of positions; backward sums over processes and scatters."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = own.new_empty(own.size(0) * group.size(), *own.shape[1:])
        distributed.all_gather_into_tensor(gathered, own.contiguous(), group=group)
        return in_order(gathered, group.size())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size()
        own = grad.new_empty(grad.size(0) // size, *grad.shape[1:])
        distributed.reduce_scatter_tensor(own, by_process(grad, size), group=ctx.group)
        return own, None


def attend(
    kernel: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup, **features: Any
) -> Tensor:
    """Causal attention of this process's queries to the whole sequence.

    Args:
        kernel: `device.kernels.sdpa` or the like: queries are the last of the keys' positions.
        query: [s/c, b, n, d]; key: [s/c, b, g, d]; value: [s/c, b, g, v].
        features: of the kernel (scale, window, sinks ...).

    Returns:
        [s/c, b, n, v].
    """
    both = _Whole.apply(torch.cat([key, value], -1), group)
    length, out = query.size(0) // 2, []
    for number, own in zip(pieces(group.rank(), group.size()), query.chunk(2), strict=True):
        keys, values = both[: (number + 1) * length].split([key.size(-1), value.size(-1)], -1)
        heads_first = (one.permute(1, 2, 0, 3) for one in (own, keys, values))
        out.append(kernel(*heads_first, **features).permute(2, 0, 1, 3))
    return torch.cat(out)
