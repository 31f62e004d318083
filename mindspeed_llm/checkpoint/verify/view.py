"""A source of logical tensors, shown as the HF tensors it stands for; and the HF tensors a conversion has to give."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.formats.lazy import TensorSource, element_count, part_of
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.tables import Entry, WeightTable
from mindspeed_llm.checkpoint.verify.exact import Adapter, Delta, Right, right_values, total

LogicalReader = Callable[[str, Ranges | None], Tensor]
"""(logical name, ranges of rows) -> values."""


BLOCK = 1 << 22
"""Elements read, compared or cast at once."""


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges along the first dimension of at most `BLOCK` elements, or one entry."""
    count = shape[0] if shape else 1
    step = max(1, BLOCK // max(1, element_count(shape[1:])))
    return ((start, min(start + step, count)) for start in range(0, count, step))


def gathered(read: Callable[[int, int], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in another type, read block by block, so that it is never in memory in both types.

    Args:
        read: gives entries `start` to `stop` along the first dimension.
    """
    if not shape:
        return read(0, 1).to(dtype)
    values = torch.empty(shape, dtype=dtype)
    for start, stop in blocks(shape):
        values[start:stop] = read(start, stop)
    return values


class HfTensors(Protocol):
    """Tensors under HF names."""

    def names(self) -> list[str]:
        """Every tensor's name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """In elements."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Element type."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries `start` to `stop` along the first dimension."""
        ...


class Places:
    """Which logical tensors each HF tensor is made of."""

    def __init__(self, table: WeightTable) -> None:
        """Invert a weight table."""
        self.held: dict[str, list[tuple[Entry, int]]] = {}
        for entry in table.entries.values():
            for part, hf in enumerate(entry.hf):
                self.held.setdefault(hf.name, []).append((entry, part))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an HF tensor."""
        entry, part = self.held[name][0]
        return entry.stored_shape(part)

    def assemble(self, name: str, read: LogicalReader, start: int, stop: int | None) -> Tensor:
        """Entries `start` to `stop` of an HF tensor, from the logical tensors that `read` gives."""
        places = self.held[name]
        if places[0][0].hf[places[0][1]].expert is None:
            entry, part = places[0]
            size = entry.hf_shape(part)[0]
            rows = (start, size if stop is None else min(stop, size))
            return part_of(lambda rows, columns: read(entry.name, rows), entry.hf_map(), part, rows)
        pieces = []
        for entry, part in places[start:stop]:
            values = part_of(lambda rows, columns, name=entry.name: read(name, rows), entry.hf_map(), part)
            pieces.append(values.t() if entry.hf[part].transposed else values)
        return torch.stack(pieces)


class HfView:
    """A model's logical tensors under the HF names of its weight table."""

    def __init__(self, source: TensorSource) -> None:
        """Show `source`."""
        self.source = source
        self.places = Places(source.table)

    def names(self) -> list[str]:
        """Every HF tensor's name."""
        return list(self.places.held)

    def shape(self, name: str) -> tuple[int, ...]:
        """In elements."""
        return self.places.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Element type."""
        return self.source.dtype(self.places.held[name][0][0].name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries `start` to `stop` along the first dimension."""
        return self.places.assemble(name, self.source.read, start, stop)


class HfDeltas(Protocol):
    """What an adapter adds to HF tensors."""

    def delta(self, name: str, start: int = 0, stop: int | None = None) -> Delta | None:
        """What it adds to entries `start` to `stop` of an HF tensor; None where it adds nothing."""
        ...


class LogicalDeltas:
    """What logical factors add to HF tensors (`HfDeltas`)."""

    def __init__(self, adapter: Adapter) -> None:
        """Show `adapter`; its weight table places the rows of B."""
        self.adapter, self.places = adapter, Places(adapter.table)

    def delta(self, name: str, start: int = 0, stop: int | None = None) -> Delta | None:
        """What it adds to entries `start` to `stop` of an HF tensor."""
        places = self.places.held.get(name)
        if places is None or not any(self.adapter.adapts(entry.name) for entry, _ in places):
            return None
        rank = 1

        def read(field: str, logical: str, rows: Ranges | None) -> Tensor:
            nonlocal rank
            delta = self.adapter.delta(logical, rows)
            if delta is None:
                height, *others = self.adapter.table.shape(logical)
                count = height if rows is None else sum(end - begin for begin, end in rows)
                return torch.zeros((count, *others), dtype=torch.float64)
            rank = max(rank, delta.rank)
            return getattr(delta, field)

        value, scale = (
            self.places.assemble(name, functools.partial(read, field), start, stop) for field in ("value", "scale")
        )
        return Delta(value, scale, rank)


class Wanted:
    """The HF tensors a conversion has to give: those of the source, with adapters merged in and in its type."""

    def __init__(
        self,
        source: HfTensors,
        table: WeightTable,
        adapters: Sequence[HfDeltas] = (),
        dtype: torch.dtype | None = None,
        head_from: tuple[str, str] | None = None,
    ) -> None:
        """Show what `source` has to become.

        Args:
            table: says which tensors may keep their type.
            dtype: that was asked for; None keeps each tensor's own.
            head_from: (head, embedding) names, where an adapter gives a tied model a head of its own.
        """
        self.source, self.adapters, self.asked = source, adapters, dtype
        self.renamed = dict([head_from]) if head_from else {}
        self.places = Places(table)
        self.found: HfTensors | None = None
        self.found_names: set[str] = set()

    def prefer(self, found: HfTensors) -> None:
        """Where two values are right, take the result's."""
        self.found, self.found_names = found, set(found.names())

    def names(self) -> list[str]:
        """Every tensor's name."""
        return [*self.source.names(), *self.renamed]

    def stored(self, name: str) -> str:
        """The source's name of a tensor."""
        return self.renamed.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """In elements."""
        return self.source.shape(self.stored(name))

    def dtype(self, name: str) -> torch.dtype:
        """The type the result has to have."""
        own = self.source.dtype(self.stored(name))
        places = self.places.held.get(name)
        if self.asked is None or places is None:
            return self.asked if name in self.renamed and self.asked else own
        keeps = places[0][0].row.keep_dtype and name in self.found_names
        return own if keeps and self.found.dtype(name) == own else self.asked

    def right(self, name: str, start: int = 0, stop: int | None = None) -> Right:
        """The right values of a tensor's entries `start` to `stop`."""
        added = [one for adapter in self.adapters if (one := adapter.delta(name, start, stop)) is not None]
        return right_values(self.source.read(self.stored(name), start, stop), total(added), self.dtype(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The right values; the result's own where it is one of two right ones."""
        right = self.right(name, start, stop)
        if name not in self.found_names or torch.equal(right.low, right.high):
            return right.nearest
        return right.among(self.found.read(name, start, stop))
