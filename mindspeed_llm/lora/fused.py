"""CCLoRA: base product and adapter in one autograd function, collectives issued early and awaited late.

The frozen W gets no gradient, so its activations need not be kept for it, and the two narrow products of the adapter
hide the wide collectives (and the other way round). Notation, rows are tokens:

    X  [n, i]  input        A' = (alpha/r) A     ax = X A'^T        G = dY B        dY [n, o]  output gradient
    ||  runs while the asynchronous collective before it is in flight.  AG all-gather, RS reduce-scatter, AR all-reduce

| case      | forward                                         | backward                                               |
|-----------|-------------------------------------------------|--------------------------------------------------------|
| single    | Y = X W^T + ax B^T                              | dX = dY W + G A'; dB = dY^T ax; dA = s G^T X           |
| column    | Y = X W^T + ax B^T                              | AR(G) || dX = dY W + G A';  AR(dX) || dB, dA           |
| column_sp | AG(X);  Y = gX W^T + gax B^T, gax = gX A'^T     | RS(G) || dX = dY W + G A';  RS(dX) || dB, dA           |
| row       | AR(ax) || O = X W^T;  AR(O) || rax B^T          | no collective: dX = dY W + G A'; dB = dY^T rax; dA     |
| row_sp    | RS(ax) || O = X W^T;  RS(O) || rax B^T          | AG(dY) || dB;  G = gdY B;  dX = gdY W + G A';  dA      |

Against the modular form: column_sp gathers nothing but X, because gax is recomputed from gX (r columns) instead of
being gathered, and is kept, so the backward pass gathers nothing at all; G A' is added before the sum over ranks, so
that one collective carries both shares of dX. Where the factor's rows are local tokens (A in column_sp, B in row_sp)
its gradient is partial and completed with the other sequence-parallel gradients.

W + B A' is never folded: in bf16 the sum rounds small adapters away, and it costs a weight-sized temporary.
"""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


class _Pending:
    """The result of a collective in flight; `wait` before use."""

    def __init__(self, work: Any, result: Tensor) -> None:
        self.work, self.result = work, result

    def wait(self) -> Tensor:
        self.work.wait()
        return self.result


def _all_gather(x: Tensor, group: ProcessGroup) -> _Pending:
    """[n/t, k] -> [n, k]."""
    out = x.new_empty(x.size(0) * group.size(), x.size(1))
    return _Pending(distributed.all_gather_into_tensor(out, x.contiguous(), group=group, async_op=True), out)


def _reduce_scatter(x: Tensor, group: ProcessGroup) -> _Pending:
    """[n, k] partial sums -> [n/t, k]."""
    out = x.new_empty(x.size(0) // group.size(), x.size(1))
    return _Pending(distributed.reduce_scatter_tensor(out, x.contiguous(), group=group, async_op=True), out)


def _all_reduce(x: Tensor, group: ProcessGroup) -> _Pending:
    """Sum in place."""
    return _Pending(distributed.all_reduce(x, group=group, async_op=True), x)


def _forward_local(x: Tensor, w: Tensor, a: Tensor, b: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    ax = x @ a.t()
    return (x @ w.t()).addmm_(ax, b.t()), ax


def _forward_column_sp(x: Tensor, w: Tensor, a: Tensor, b: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    return _forward_local(_all_gather(x, group).wait(), w, a, b, group)


def _forward_row(x: Tensor, w: Tensor, a: Tensor, b: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    ax = _all_reduce(x @ a.t(), group)
    out = x @ w.t()
    ax = ax.wait()
    out = _all_reduce(out, group)
    low_rank = ax @ b.t()
    return out.wait().add_(low_rank), ax


def _forward_row_sp(x: Tensor, w: Tensor, a: Tensor, b: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    ax = _reduce_scatter(x @ a.t(), group)
    out = x @ w.t()
    ax = ax.wait()
    out = _reduce_scatter(out, group)
    low_rank = ax @ b.t()
    return out.wait().add_(low_rank), ax


_FORWARD = {
    "single": _forward_local,
    "column": _forward_local,
    "column_sp": _forward_column_sp,
    "row": _forward_row,
    "row_sp": _forward_row_sp,
}


class _LoraLinear(torch.autograd.Function):
    """Y = X W^T + (X A'^T) B^T; see the module's table."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float, case: str, group: ProcessGroup
    ) -> Tensor:
        flat = x.reshape(-1, x.size(-1))
        scaled = a * scaling
        out, ax = _FORWARD[case](flat, w, scaled, b, group)
        ctx.save_for_backward(flat, ax, w, scaled, b)
        ctx.scaling, ctx.case, ctx.group, ctx.shape = scaling, case, group, x.shape
        return out.view(-1, x.size(1), out.size(-1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat = grad.reshape(-1, grad.size(-1))
        step = _backward_row if ctx.case.startswith("row") else _backward_column
        dx, da, db = step(ctx, flat, ctx.needs_input_grad[0])
        return (None if dx is None else dx.view(ctx.shape), None, da, db, None, None, None)


def _backward_column(ctx: Any, dy: Tensor, needs_dx: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """single, column and column_sp: dY is split over outputs, so G and dX are sums over ranks."""
    x, ax, w, a, b = ctx.saved_tensors
    reduce = {"single": None, "column": _all_reduce, "column_sp": _reduce_scatter}[ctx.case]
    g = dy @ b
    dx = None
    if reduce is None:
        if needs_dx:
            dx = (dy @ w).addmm_(g, a)
        return dx, (g.t() @ x).mul_(ctx.scaling), dy.t() @ ax
    # the all-reduce works in place, while the local g is still needed for dX
    pending_g = reduce(g.clone() if needs_dx and ctx.case == "column" else g, ctx.group)
    pending_dx = reduce((dy @ w).addmm_(g, a), ctx.group) if needs_dx else None
    db = dy.t() @ ax
    da = (pending_g.wait().t() @ x).mul_(ctx.scaling)
    return pending_dx.wait() if pending_dx else None, da, db


def _backward_row(ctx: Any, dy: Tensor, needs_dx: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """row and row_sp: every rank needs the whole dY, and nothing is summed afterwards."""
    x, ax, w, a, b = ctx.saved_tensors
    whole = _all_gather(dy, ctx.group) if ctx.case == "row_sp" else None
    db = dy.t() @ ax
    dy = whole.wait() if whole else dy
    g = dy @ b
    da = (g.t() @ x).mul_(ctx.scaling)
    return (dy @ w).addmm_(g, a) if needs_dx else None, da, db


def apply(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float, case: str, group: ProcessGroup) -> Tensor:
    """Base product plus adapter of one parallel linear layer, without its bias.

    Args:
        x: [s, b, i] (column), [s/t, b, i] (column_sp), [s, b, i/t] (row, row_sp).
        w, a, b: this rank's weight [o, i] (frozen), A [r, i] and B [o, r], in x's dtype.
        scaling: alpha / r.
        case: "single", "column", "column_sp", "row" or "row_sp".
        group: the TP group.

    Returns:
        [s, b, o/t] (column), [s, b, o] (row), [s/t, b, o] (row_sp).
    """
    return _LoraLinear.apply(x, w, a, b, scaling, case, group)
