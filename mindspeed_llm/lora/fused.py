"""CCLoRA: base product and adapter in one autograd function, with no more collectives than the base layer alone.

Rows are tokens, s = alpha / r. A pass takes rows through the frozen weight and, beside it, through the adapter's
narrow tensor (`low`); the backward pass is the same pass with the roles exchanged:

    forward   low = s X A^T     Y  = X W^T + low B^T        dB = dY^T low
    backward  low' = s dY B     dX = dY W  + low' A         dA = low'^T X

How the rows travel is a property of the layer (`CASES`), and backward they travel the other way:

    entry   forward               backward                      exit      forward             backward
    keep    -                     -                             keep      -                   -
    copy    -                     all-reduce [dX | low']        reduce    all-reduce [Y|low]  -
    gather  all-gather X          reduce-scatter [dX | low']    scatter   reduce-scatter      all-gather dY

The narrow tensor rides beside the wide one it belongs to, or is computed from gathered rows: it never is a message of
its own (but for dropout on gathered rows, whose masks differ by rank, and below the first adapter, where no dX is
asked for). The adapter's share is added after the sum over ranks: a sum in bf16 of partial shares would round small
adapters away once per rank. For the same reason W + s B A is never formed. `overlap` cuts wide tensors into chunks.

`docs/lora.md` has the costs of every case. A case that is not in the table runs in the modular form (`layers`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mindspeed_llm.lora.dropout import Dropout
from mindspeed_llm.lora.overlap import CHUNK_BYTES, IDLE, Meanwhile, Outgoing, Way, all_gather, outer, stream


@dataclass(frozen=True)
class Case:
    """How rows travel into and out of a layer in the forward pass; see the module's second table."""

    entry: str = "keep"
    exit: str = "keep"

    @property
    def split(self) -> bool:
        """Whether ranks hold their own rows on the side where something is communicated."""
        return "gather" in (self.entry, self.exit) or "scatter" in (self.entry, self.exit)

    @property
    def forward(self) -> Way:
        """Of X to Y."""
        return Way(self.entry == "gather", self.exit in ("reduce", "scatter"), self.split)

    @property
    def backward(self) -> Way:
        """Of dY to dX."""
        return Way(self.exit == "scatter", self.entry in ("copy", "gather"), self.split)


CASES = {
    "single": Case(),
    "expert": Case(),  # its dispatcher moves the rows
    "column": Case(entry="copy"),
    "column_sp": Case(entry="gather"),
    "row": Case(exit="reduce"),
    "row_sp": Case(exit="scatter"),
    "mlp_single": Case(),
    "mlp": Case(entry="copy", exit="reduce"),
    "mlp_sp": Case(entry="gather", exit="scatter"),
}


@dataclass(frozen=True)
class Plan:
    """What a fused layer needs besides tensors.

    Attributes:
        case: key of `CASES`.
        group: over which the layer is split.
        chunk_bytes: least size of a chunk.
    """

    case: str
    group: ProcessGroup
    chunk_bytes: int = CHUNK_BYTES


@dataclass(frozen=True)
class Product:
    """One pass's matrices: rows [., i] -> rows [., o] + low [., r] up.

    Attributes:
        wide: [i, o], or None where only `low` is asked for.
        down: [i, r]. up: [r, o].
        scaling: alpha / r.
        before: dropout's factors of the rows that `down` sees; None without.
        after: dropout's factors of what `up` adds; None without.
    """

    wide: Tensor | None
    down: Tensor
    up: Tensor
    scaling: float
    before: Tensor | None = None
    after: Tensor | None = None

    @property
    def width(self) -> int:
        """Columns of the wide result."""
        return 0 if self.wide is None else self.wide.size(1)

    @property
    def rank(self) -> int:
        """Columns of the narrow tensor."""
        return self.down.size(1)

    def low(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """s X down of the rows x, which are `rows` of all that `before` knows."""
        seen = x if self.before is None else x * self.before[rows]
        return (seen @ self.down).mul_(self.scaling)

    def base(self, x: Tensor, out: Tensor) -> None:
        """Write the wide product of x into out."""
        if self.wide is not None:
            torch.mm(x, self.wide, out=out)

    def add(self, base: Tensor, low: Tensor, out: Tensor, rows: slice) -> None:
        """Write base + the adapter's share of `rows` into out, which may be base."""
        if self.wide is None:
            return
        if self.after is None:
            torch.addmm(base, low, self.up, out=out)
        else:
            torch.add(base, (low @ self.up).mul_(self.after[rows]), out=out)


class Pass:
    """Rows through one product, row block by row block, for `overlap.stream`.

    Where results are summed over ranks, [wide | low] travel side by side and the adapter's share is added afterwards;
    else it is added at once.
    """

    def __init__(self, x: Tensor, product: Product, way: Way, group: ProcessGroup, total: int | None = None) -> None:
        """Args: x: the rows this rank has when the pass begins. total: rows of the pass, if not those or all ranks'."""
        self.product, self.way, self.start = product, way, x.size(0) * group.rank()
        total = x.size(0) * (group.size() if way.gathers else 1) if total is None else total
        self.lows = x.new_empty(0 if way.sums else total, product.rank)
        self.pending = None
        if way.gathers and product.before is not None:  # a rank knows the mask of its own rows only
            self.own = product.low(x)
            self.pending = all_gather(self.lows, self.own, group)

    @property
    def columns(self) -> int:
        """Of a result row."""
        return self.product.width + (self.product.rank if self.way.sums else 0)

    def low(self, rows: slice, x: Tensor) -> Tensor:
        """`low` of rows (in natural order) with values x."""
        if self.pending is None:
            found = self.product.low(x, rows)
            self.lows[rows] = found
            return found
        first = rows.start - self.start
        if 0 <= first < self.own.size(0):
            return self.own[first : first + x.size(0)]
        self.pending.wait()
        return self.lows[rows]

    def run(self, rows: slice, x: Tensor, out: Tensor) -> None:
        """x [., i] -> out [., columns]."""
        width = self.product.width
        self.product.base(x, out[:, :width])
        if self.way.sums:
            out[:, width:] = self.product.low(x, rows)
        else:
            self.product.add(out, self.low(rows, x), out, rows)

    def finish(self, results: Tensor | Outgoing) -> tuple[Tensor, Tensor]:
        """What `overlap.stream` gave -> (wide [., o] with the adapter's share, low [., r])."""
        if not isinstance(results, Outgoing):
            return results, self.lows
        width, block = self.product.width, results.chunks.rows
        out, low = results.rows.new_empty(block, width), results.rows.new_empty(block, self.product.rank)
        for chunk in range(results.chunks.count):
            local, sums = results.receive(chunk)
            low[local] = sums[:, width:]
            self.product.add(sums[:, :width], low[local], out[local], local)
        return out, low


def go(x: Tensor, product: Product, way: Way, plan: Plan, meanwhile: Meanwhile = IDLE) -> tuple[Tensor, Tensor]:
    """One pass of rows x through one product: (wide, low)."""
    step = Pass(x, product, way, plan.group)
    return step.finish(stream(x, step.columns, step.run, way, plan.group, plan.chunk_bytes, meanwhile))


class _LoraLinear(torch.autograd.Function):
    """Y = X W^T + s (X A^T) B^T; see the module's equations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float, plan: Plan, dropout: Dropout | None
    ) -> Tensor:
        flat = x.reshape(-1, x.size(-1))
        product = Product(w.t(), a.t(), b.t(), scaling, before=dropout and dropout.factors(flat))
        out, low = go(flat, product, CASES[plan.case].forward, plan)
        ctx.save_for_backward(flat, low, w, a, b)
        ctx.scaling, ctx.plan, ctx.shape, ctx.dropout = scaling, plan, x.shape, dropout
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, w, a, b = ctx.saved_tensors
        factors = ctx.dropout and ctx.dropout.factors(x)
        dy = grad.reshape(-1, grad.size(-1))
        wanted = ctx.needs_input_grad[0]
        product = Product(w if wanted else None, b, a, ctx.scaling, after=factors)
        db: list[Tensor] = []

        def grad_b() -> None:
            db.append(outer(dy, low))

        way = CASES[ctx.plan.case].backward
        meanwhile = Meanwhile(late=grad_b) if way.sums else Meanwhile(early=grad_b)
        dx, low_grad = go(dy, product, way, ctx.plan, meanwhile)
        da = low_grad.t() @ (x if factors is None else x * factors)
        return (dx.view(ctx.shape) if wanted else None, None, da, *db, None, None, None)


def apply(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float, plan: Plan, dropout: Dropout | None = None
) -> Tensor:
    """Base product plus adapter of one parallel linear layer, without its bias.

    Args:
        x: [s, b, i] (column), [s/t, b, i] (column_sp), [s, b, i/t] (row, row_sp), [tokens, i] (expert).
        w, a, b: this rank's weight [o, i] (frozen), A [r, i] and B [o, r], in x's dtype.
        scaling: alpha / r.
        plan: the layer's case, group and chunk size.
        dropout: of x for the adapter; None without.

    Returns:
        [s, b, o/t] (column), [s, b, o] (row), [s/t, b, o] (row_sp), [tokens, o] (expert).
    """
    out = _LoraLinear.apply(x, w, a, b, scaling, plan, dropout)
    return out.view(-1, *x.shape[1:-1], out.size(-1))  # viewed here: inside, it could not be changed in place
