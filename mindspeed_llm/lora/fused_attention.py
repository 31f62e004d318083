"""CCLoRA over a whole attention: the batch's sequences go through qkv, core and output projection one after the other.

What one chunk of sequences sends is hidden by all the work of the next one, not by its own product alone, which is too
short for that: the output projection has a twelfth of a layer's products, but a quarter of its bytes.

    forward   Enter -> (Column c -> core c -> Row c) for every chunk c -> Join
    backward  Join -> (Row c -> core c -> Column c), the last chunk first -> Enter

Sequences do not see each other, so each chunk passes through megatron-core's own attention as it is. `Column` and `Row`
hand over empty tensors (tokens), which keep autograd's order, where rows are still on their way; the rows themselves
lie in a `Flight`. Sums that travel are those of `fused`: [dX | low'] backward, [Y | low] forward, once per row.

Shapes: s sequence, b sequences, h hidden size, r rank; `/t` = divided by TP, under sequence parallelism only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mindspeed_llm.lora.fused import CASES, Product
from mindspeed_llm.lora.layers import ColumnParallelLora, ParallelLora, RowParallelLora
from mindspeed_llm.lora.overlap import Chunks, Pending, all_gather, all_reduce, joined, outer, reduce_scatter


class Passage:
    """Rows of all chunks through one product; gathered where ranks hold their own, whose product then comes first.

    A chunk's tensors are let go when it is taken.
    """

    def __init__(self, own: Sequence[Tensor], product: Product, group: ProcessGroup, split: bool) -> None:
        """Args: own: this rank's rows of every chunk, in the order in which they are needed."""
        self.product, self.rank, self.split = product, group.rank(), split
        self.own: list[Tensor | None] = list(own)
        self.made: list[tuple[Tensor, Tensor] | None] = []
        self.rows: list[Tensor | None] = list(own)
        self.pending: list[Pending] = []
        if split:
            self.rows = [x.new_empty(x.size(0) * group.size(), x.size(1)) for x in own]
            self.pending = [all_gather(rows, x, group) for rows, x in zip(self.rows, own, strict=True)]

    def _compute(self, out: Tensor, low: Tensor, rows: slice, x: Tensor) -> None:
        """Fill `rows` of both results from the rows x."""
        if rows.start == rows.stop:
            return
        low[rows] = self.product.low(x)
        self.product.base(x, out[rows])
        self.product.add(out[rows], low[rows], out[rows], rows)

    def _begin(self) -> None:
        """Make room for all results, and compute those of the rank's own rows if others are on their way."""
        width, rank = self.product.width, self.product.rank
        for x, rows in zip(self.own, self.rows, strict=True):
            out, low = x.new_empty(rows.size(0), width), x.new_empty(rows.size(0), rank)
            if self.split:
                self._compute(out, low, slice(self.rank * x.size(0), (self.rank + 1) * x.size(0)), x)
            self.made.append((out, low))

    def take(self, number: int) -> tuple[Tensor, Tensor]:
        """(result [., o], low [., r]) of a chunk of all ranks."""
        if not self.made:
            self._begin()
        (out, low), rows, parts = self.made[number], self.rows[number], [slice(0, self.rows[number].size(0))]
        if self.split:
            self.pending[number].wait()
            size = self.own[number].size(0)
            parts = [slice(0, self.rank * size), slice((self.rank + 1) * size, rows.size(0))]
        for part in parts:
            self._compute(out, low, part, rows[part])
        self.made[number] = self.rows[number] = self.own[number] = None
        return out, low


class Flight:
    """One call's rows on their way.

    Attributes:
        columns: sequences of each chunk.
        split: under sequence parallelism.
    """

    def __init__(self, sequences: int, count: int, group: ProcessGroup, split: bool) -> None:
        self.columns = [slice(sequences * c // count, sequences * (c + 1) // count) for c in range(count)]
        self.group, self.split = group, split
        self.sent: dict[int, tuple[Pending, Tensor, Tensor]] = {}
        self.passage: Passage | None = None
        self.wanted = True

    def cut(self, x: Tensor) -> list[Tensor]:
        """[s, b, h] -> [s b_c, h] of every chunk."""
        return [x[:, columns].reshape(-1, x.size(-1)) for columns in self.columns]

    def send(self, chunk: int, rows: Tensor) -> None:
        """Sum rows [s b_c, k] over ranks; each gets all of them, or its own under sequence parallelism."""
        if self.split:
            sums = rows.new_empty(rows.size(0) // self.group.size(), rows.size(1))
            self.sent[chunk] = reduce_scatter(sums, rows, self.group), sums, rows
        else:
            self.sent[chunk] = all_reduce(rows, self.group), rows, rows

    def receive(self, chunk: int) -> Tensor:
        """The sums of a chunk."""
        pending, sums, _ = self.sent.pop(chunk)
        pending.wait()
        return sums

    def settle(self, like: Tensor, width: int, up: Tensor, order: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Sums [wide | low] of all chunks -> (wide + low up [s, b, width], low [s, b, r]); `like`: [s, b, .]."""
        s, b = like.shape[:2]
        out, low = like.new_empty(s, b, width), like.new_empty(s, b, up.size(0))
        for chunk in order:
            sums, columns = self.receive(chunk), self.columns[chunk]
            narrow = sums[:, width:]
            low[:, columns] = narrow.view(s, -1, up.size(0))
            if width:
                out[:, columns] = torch.addmm(sums[:, :width], narrow, up).view(s, -1, width)
        return out, low

    def complete(self, parts: list[Tensor], part: Tensor) -> Tensor | None:
        """A factor's gradient, once all chunks have given their part."""
        parts.append(part)
        return joined(parts) if len(parts) == len(self.columns) else None


def summed(x: Tensor, product: Product) -> Tensor:
    """[x wide | low], to be summed over ranks."""
    width = product.width
    rows = x.new_empty(x.size(0), width + product.rank)
    product.base(x, rows[:, :width])
    rows[:, width:] = product.low(x)
    return rows


class _Enter(torch.autograd.Function):
    """The input's way into the chunks; backward, what they send back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float, flight: Flight) -> Any:
        flight.wanted = ctx.needs_input_grad[0]
        product = Product(w.t(), a.t(), b.t(), scaling)
        flight.passage = Passage(flight.cut(x), product, flight.group, flight.split)
        ctx.save_for_backward(x, a)
        ctx.flight = flight
        return tuple(x.new_empty(0) for _ in flight.columns)

    @staticmethod
    def backward(ctx: Any, *tokens: Tensor) -> tuple[Tensor | None, ...]:
        x, a = ctx.saved_tensors
        flight = ctx.flight
        width, order = a.size(1) if flight.wanted else 0, range(len(flight.columns))[::-1]
        dx, low = flight.settle(x, width, a, order)
        da = low.view(-1, low.size(-1)).t() @ x.reshape(-1, x.size(-1))
        return (dx if flight.wanted else None), None, da, None, None, None


class _Column(torch.autograd.Function):
    """A chunk through the layer whose output is split."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        flight: Flight,
        chunk: int,
        parts: list,
    ) -> Tensor:
        out, low = flight.passage.take(chunk)
        ctx.save_for_backward(low, w, a, b)
        ctx.scaling, ctx.flight, ctx.chunk, ctx.parts = scaling, flight, chunk, parts
        columns = flight.columns[chunk]
        return out.view(-1, columns.stop - columns.start, out.size(1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, w, a, b = ctx.saved_tensors
        dy, flight = grad.reshape(-1, grad.size(-1)), ctx.flight
        flight.send(ctx.chunk, summed(dy, Product(w if flight.wanted else None, b, a, ctx.scaling)))
        db = flight.complete(ctx.parts, outer(dy, low))
        return dy.new_empty(0), None, None, db, None, None, None, None


class _Row(torch.autograd.Function):
    """A chunk through the layer whose input is split; its output is on its way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float, flight: Flight, chunk: int, parts: list
    ) -> Tensor:
        flat = x.reshape(-1, x.size(-1))
        flight.send(chunk, summed(flat, Product(w.t(), a.t(), b.t(), scaling)))
        ctx.save_for_backward(flat)
        ctx.flight, ctx.chunk, ctx.shape, ctx.parts = flight, chunk, x.shape, parts
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        flight = ctx.flight
        dx, low = flight.passage.take(len(flight.columns) - 1 - ctx.chunk)
        da = flight.complete(ctx.parts, low.t() @ x)
        return dx.view(ctx.shape), None, da, None, None, None, None, None


class _Join(torch.autograd.Function):
    """The chunks' outputs, once they are here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float, flight: Flight, *tokens: Tensor
    ) -> Tensor:
        out, low = flight.settle(x, w.size(0), b.t(), range(len(flight.columns)))
        ctx.save_for_backward(low, w, a, b)
        ctx.flight, ctx.scaling = flight, scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, w, a, b = ctx.saved_tensors
        flight = ctx.flight
        flight.passage = Passage(flight.cut(grad)[::-1], Product(w, b, a, ctx.scaling), flight.group, flight.split)
        db = outer(grad.reshape(-1, grad.size(-1)), low.view(-1, low.size(-1)))
        return None, None, None, db, None, None, *(grad.new_empty(0) for _ in flight.columns)


@contextmanager
def instead(layer: ParallelLora, leg: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `leg` compute a layer's output while the context lasts."""
    layer.leg = leg
    try:
        yield
    finally:
        layer.leg = None


class AdaptedAttention:
    """Attention over several sequences whose two layers have adapters, chunk by chunk.

    Attributes:
        qkv, proj: the adapted layers.
    """

    def __init__(self, qkv: ColumnParallelLora, proj: RowParallelLora) -> None:
        self.qkv, self.proj = qkv, proj

    @staticmethod
    def fits(attention: nn.Module) -> bool:
        """Whether an attention's layers are both adapted and fused, over more than one rank."""
        qkv, proj = attention.linear_qkv, attention.linear_proj
        if not (isinstance(qkv, ColumnParallelLora) and isinstance(proj, RowParallelLora)):
            return False
        added = getattr(proj.base_layer, "own_bias", proj.base_layer.bias) is not None
        return qkv.fuses and proj.fuses and qkv.group.size() > 1 and not added

    def count(self, x: Tensor) -> int:
        """Into how many chunks a batch [s, b, h] is cut; 1: there is nothing to gain here."""
        drops = self.qkv.training and any(p.p for one in (self.qkv, self.proj) for p in one.lora_dropout.values()
                                          if isinstance(p, nn.Dropout))  # fmt: skip
        if self.qkv.disable_adapters or self.proj.disable_adapters or drops:
            return 1
        if not all(one.fuses and one.case in CASES for one in (self.qkv, self.proj)):
            return 1
        ranks = self.qkv.group.size() if self.qkv.sequence_parallel else 1
        row_bytes = x.size(0) * ranks * x.size(2) * x.element_size()
        return Chunks.fit(x.size(1), 1, row_bytes, self.qkv.chunk_bytes).count

    def __call__(self, attend: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor, count: int) -> tuple[Tensor, Any]:
        """[s, b, h] or [s/t, b, h] -> (the same, bias).

        Args:
            attend: the attention of a chunk: what qkv reads -> (what the projection gives, bias).
        """
        flight = Flight(x.size(1), count, self.qkv.group, self.qkv.sequence_parallel)
        w1, w2 = self.qkv.base_layer.weight, self.proj.base_layer.weight
        (a1, b1, s1), (a2, b2, s2) = self.qkv.factors(), self.proj.factors()
        parts_b1: list[Tensor] = []
        parts_a2: list[Tensor] = []
        tokens, bias = [], None
        for chunk, token in enumerate(_Enter.apply(x, w1, a1, b1, s1, flight)):

            def column(token: Tensor, chunk: int = chunk) -> Tensor:
                return _Column.apply(token, w1, a1, b1, s1, flight, chunk, parts_b1)

            def row(core: Tensor, chunk: int = chunk) -> Tensor:
                return _Row.apply(core, w2, a2, b2, s2, flight, chunk, parts_a2)

            with instead(self.qkv, column), instead(self.proj, row):
                sent, bias = attend(token)
            tokens.append(sent)
        return _Join.apply(x.detach(), w2, a2, b2, s2, flight, *tokens), bias
