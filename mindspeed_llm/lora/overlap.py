"""Rows that travel between ranks chunk by chunk, while the products of other rows run.

Rows are tokens. Where n rows are gathered from t ranks or scattered to them, each rank's block has m = n / t rows. A
chunk is the same rows of every block, and one collective:

    natural order: block by block, as the sequence runs        wire order: chunk by chunk, within a chunk block by block

With one chunk the two orders are the same. A collective is asynchronous where work is left to hide it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

CHUNK_BYTES = 1 << 20
"""Least bytes of a chunk: below about this size latency, not bandwidth, is what a message costs."""
MOST_CHUNKS = 4
"""Of one tensor: what stays exposed is about one chunk, and each further one makes the products smaller."""


@dataclass(frozen=True)
class Piece:
    """The same rows in both orders, contiguous in each."""

    wire: slice
    natural: slice


@dataclass(frozen=True)
class Chunks:
    """How n = rows x blocks rows are cut.

    Attributes:
        rows: of a block.
        blocks: ranks that hold one each; 1 where every rank has all rows.
        count: of chunks.
    """

    rows: int
    blocks: int
    count: int

    @classmethod
    def fit(cls, rows: int, blocks: int, row_bytes: int, least: int = CHUNK_BYTES) -> "Chunks":
        """As many chunks as leave each one `least` bytes, up to MOST_CHUNKS; the same on every rank."""
        return cls(rows, blocks, max(1, min(MOST_CHUNKS, rows, rows * blocks * row_bytes // max(least, 1))))

    @property
    def total(self) -> int:
        """n."""
        return self.rows * self.blocks

    def local(self, chunk: int) -> slice:
        """The rows of a block that are in a chunk."""
        return slice(self.rows * chunk // self.count, self.rows * (chunk + 1) // self.count)

    def wire(self, chunk: int) -> slice:
        """A chunk in wire order."""
        local = self.local(chunk)
        return slice(local.start * self.blocks, local.stop * self.blocks)

    def pieces(self, chunk: int, blocks: range | None = None) -> list[Piece]:
        """A chunk's rows that come from `blocks` (consecutive; all without), in as few pieces as possible."""
        blocks = range(self.blocks) if blocks is None else blocks
        if not blocks:
            return []
        if self.count == 1:
            rows = slice(blocks.start * self.rows, blocks.stop * self.rows)
            return [Piece(rows, rows)]
        local, start = self.local(chunk), self.wire(chunk).start
        size = local.stop - local.start
        return [
            Piece(
                slice(start + block * size, start + (block + 1) * size),
                slice(block * self.rows + local.start, block * self.rows + local.stop),
            )
            for block in blocks
        ]

    def others(self, chunk: int, rank: int) -> list[Piece]:
        """A chunk's rows but the rank's own."""
        return self.pieces(chunk, range(rank)) + self.pieces(chunk, range(rank + 1, self.blocks))

    def own(self, chunk: int, rank: int) -> Piece:
        """A chunk's rows that the rank holds itself."""
        return self.pieces(chunk, range(rank, rank + 1))[0]


class Pending:
    """A collective that may still be in flight."""

    def __init__(self, work: Any) -> None:
        """Args: work: torch's handle, or None for one that is done."""
        self.work = work

    def wait(self) -> None:
        """Return when its result may be read."""
        if self.work is not None:
            self.work.wait()
            self.work = None


def all_gather(out: Tensor, x: Tensor, group: ProcessGroup, hidden: bool = True) -> Pending:
    """[m, k] of every rank -> out [n, k]; asynchronous if `hidden` behind other work."""
    return Pending(distributed.all_gather_into_tensor(out, x.contiguous(), group=group, async_op=hidden))


def reduce_scatter(out: Tensor, x: Tensor, group: ProcessGroup, hidden: bool = True) -> Pending:
    """Sums of x [n, k] over ranks -> out [m, k], the rank's own block."""
    return Pending(distributed.reduce_scatter_tensor(out, x, group=group, async_op=hidden))


def all_reduce(x: Tensor, group: ProcessGroup, hidden: bool = True) -> Pending:
    """Sums over ranks, in place."""
    return Pending(distributed.all_reduce(x, group=group, async_op=hidden))


class Incoming:
    """Every rank's rows on their way here, all chunks at once."""

    def __init__(self, x: Tensor, chunks: Chunks, group: ProcessGroup) -> None:
        """Args: x: [m, k], the rank's own rows."""
        self.x, self.chunks, self.rank = x, chunks, group.rank()
        self.rows = x.new_empty(chunks.total, x.size(1))
        self.pending = [all_gather(self.rows[chunks.wire(c)], x[chunks.local(c)], group) for c in range(chunks.count)]

    def others(self, chunk: int) -> list[tuple[Piece, Tensor]]:
        """The other ranks' rows of a chunk, once they are here."""
        self.pending[chunk].wait()
        return [(piece, self.rows[piece.wire]) for piece in self.chunks.others(chunk, self.rank)]


class Outgoing:
    """Rows to be summed over ranks; each rank gets all sums (one block) or its own block of them.

    Attributes:
        rows: [n, k] in wire order, to be filled chunk by chunk and sent.
    """

    def __init__(self, like: Tensor, columns: int, chunks: Chunks, group: ProcessGroup) -> None:
        self.chunks, self.group = chunks, group
        self.rows = like.new_empty(chunks.total, columns)
        self.sums = self.rows if chunks.blocks == 1 else like.new_empty(chunks.rows, columns)
        self.pending: list[Pending] = []

    def send(self, chunk: int, busy: bool) -> None:
        """Send a filled chunk.

        Args:
            busy: whether anything is left to do before its sums are needed.
        """
        wire = self.rows[self.chunks.wire(chunk)]
        if self.chunks.blocks == 1:
            self.pending.append(all_reduce(wire, self.group, busy))
        else:
            self.pending.append(reduce_scatter(self.sums[self.chunks.local(chunk)], wire, self.group, busy))

    def receive(self, chunk: int) -> tuple[slice, Tensor]:
        """(rows of the block, their sums) of a chunk, once they are here."""
        self.pending[chunk].wait()
        local = self.chunks.local(chunk)
        return local, self.sums[local]


@dataclass(frozen=True)
class Way:
    """How the rows of a pass travel.

    Attributes:
        gathers: every rank brings its own rows and works on all.
        sums: results are summed over ranks.
        split: ranks hold their own rows before they are gathered, or after they are summed.
    """

    gathers: bool = False
    sums: bool = False
    split: bool = False


Work = Callable[[], None]
Each = Callable[[slice, Tensor, Tensor], Work | None]


def nothing() -> None:
    """No work."""


@dataclass(frozen=True)
class Meanwhile:
    """Work that hides communication.

    Attributes:
        early: done while gathered rows are on their way.
        late: done while the last sums are on their way.
    """

    early: Work = nothing
    late: Work = nothing


IDLE = Meanwhile()


def stream(
    x: Tensor,
    columns: int,
    each: Each,
    way: Way,
    group: ProcessGroup,
    least: int = CHUNK_BYTES,
    meanwhile: Meanwhile = IDLE,
) -> Tensor | Outgoing:
    """Run `each` over all rows, as they come in, and send its results off as they are ready.

    Args:
        x: the rows this rank has: [m, i] where they are gathered, else [n, i].
        columns: of a result row.
        each: (rows in natural order, their [., i], where to write their [., columns]) -> work that may be done once the
            results are on their way, or None.
        way: how rows come in and results go out.
        least: bytes of a chunk.

    Returns:
        The results [n, columns] in natural order, or the sums of them under way.
    """
    parts = group.size() if way.split else 1
    block = x.size(0) if way.gathers or not way.split else x.size(0) // parts
    width = max(x.size(1) if way.gathers else 0, columns if way.sums else 0)
    communicates = way.gathers or way.sums
    chunks = Chunks.fit(block, parts, width * x.element_size(), least) if communicates else Chunks(block, 1, 1)
    incoming = Incoming(x, chunks, group) if way.gathers else None
    outgoing = Outgoing(x, columns, chunks, group) if way.sums else None
    out = outgoing.rows if outgoing is not None else x.new_empty(chunks.total, columns)

    def run(rows: Sequence[tuple[Piece, Tensor]]) -> list[Work]:
        left = [each(piece.natural, x_rows, out[piece.wire if way.sums else piece.natural]) for piece, x_rows in rows]
        return [work for work in left if work is not None]

    if incoming is not None:
        left = _own_rows(incoming, each, out, way.sums)
        if left is not None:
            left()
    meanwhile.early()
    for chunk in range(chunks.count):
        if incoming is not None:
            left = run(incoming.others(chunk))
        else:
            left = run([(piece, x[piece.natural]) for piece in chunks.pieces(chunk)])
        if outgoing is not None:
            outgoing.send(chunk, busy=bool(left) or meanwhile.late is not nothing or chunks.count > 1)
        for work in left:
            work()
    meanwhile.late()
    return out if outgoing is None else outgoing


def _own_rows(incoming: Incoming, each: Each, out: Tensor, wired: bool) -> Work | None:
    """Run `each` over the rows the rank brought, all at once: large products take less time than small ones.

    Args:
        out: for the results of all ranks' rows.
        wired: it is in wire order, in which the rank's own rows lie apart.
    """
    x, chunks, rank = incoming.x, incoming.chunks, incoming.rank
    natural = slice(rank * chunks.rows, (rank + 1) * chunks.rows)
    if not wired or chunks.count == 1:
        return each(natural, x, out[natural])
    results = out.new_empty(chunks.rows, out.size(1))
    left = each(natural, x, results)
    for chunk in range(chunks.count):
        out[chunks.own(chunk, rank).wire] = results[chunks.local(chunk)]
    return left


def outer(dy: Tensor, low: Tensor) -> Tensor:
    """dY^T low [o, r] from dY [n, o] and low [n, r], turned: only the narrow operand is read across its rows.

    On a CPU that takes 0.6 of the time in float32, 0.75 in bfloat16.
    """
    return torch.mm(low.t(), dy).t()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The sum of partial products, added up in fp32 so that many parts round no worse than one."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].float()
    for part in parts[1:]:
        total += part
    return total.to(parts[0].dtype)
