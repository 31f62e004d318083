"""A source of logical tensors, shown as the HF tensors it stands for; and the HF tensors a conversion has to give."""

from collections.abc import Callable
from typing import Protocol

import torch

from mindspeed_llm.checkpoint.formats.lazy import TensorSource, part_of
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.tables import Entry, WeightTable
from mindspeed_llm.checkpoint.verify.exact import Adapter, Delta, Right, right_values

LogicalReader = Callable[[str, Ranges | None], torch.Tensor]
"""(logical name, ranges of rows) -> values."""


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

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
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

    def assemble(self, name: str, read: LogicalReader, start: int, stop: int | None) -> torch.Tensor:
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

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Entries `start` to `stop` along the first dimension."""
        return self.places.assemble(name, self.source.read, start, stop)


class Wanted:
    """The HF tensors a conversion has to give: those of the source, with the adapter merged in and in its type."""

    def __init__(
        self, source: HfTensors, table: WeightTable, adapter: Adapter | None, dtype: torch.dtype | None
    ) -> None:
        """Show what `source` has to become.

        Args:
            table: places the adapter's rows, and says which tensors may keep their type.
            dtype: that was asked for; None keeps each tensor's own.
        """
        self.source, self.adapter, self.asked = source, adapter, dtype
        self.places = Places(table)
        self.found: HfTensors | None = None
        self.found_names: set[str] = set()

    def prefer(self, found: HfTensors) -> None:
        """Where two values are right, take the result's."""
        self.found, self.found_names = found, set(found.names())

    def names(self) -> list[str]:
        """Every tensor's name."""
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """In elements."""
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The type the result has to have."""
        own = self.source.dtype(name)
        places = self.places.held.get(name)
        if self.asked is None or places is None:
            return own
        keeps = places[0][0].row.keep_dtype and name in self.found_names
        return own if keeps and self.found.dtype(name) == own else self.asked

    def right(self, name: str, start: int = 0, stop: int | None = None) -> Right:
        """The right values of a tensor's entries `start` to `stop`."""
        return right_values(self.source.read(name, start, stop), self.delta(name, start, stop), self.dtype(name))

    def delta(self, name: str, start: int, stop: int | None) -> Delta | None:
        """What the adapter adds there; None where it adds nothing."""
        places = self.places.held.get(name)
        if self.adapter is None or places is None or not any(self.adapter.adapts(entry.name) for entry, _ in places):
            return None
        rank = 1
        sums = []
        for field in ("value", "scale"):

            def read(logical: str, rows: Ranges | None, field: str = field) -> torch.Tensor:
                nonlocal rank
                delta = self.adapter.delta(logical, rows)
                if delta is None:
                    shape = self.adapter.lora.tensors.table.shape(logical)
                    count = shape[0] if rows is None else sum(end - begin for begin, end in rows)
                    return torch.zeros((count, *shape[1:]), dtype=torch.float64)
                rank = max(rank, delta.rank)
                return getattr(delta, field)

            sums.append(self.places.assemble(name, read, start, stop))
        return Delta(sums[0], sums[1], rank)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The right values; the result's own where it is one of two right ones."""
        right = self.right(name, start, stop)
        if name not in self.found_names or torch.equal(right.low, right.high):
            return right.nearest
        return right.among(self.found.read(name, start, stop))
