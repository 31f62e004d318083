"""Merging an adapter, and changing the type of weights, as a source over another source.

    W' = W + alpha / r * B @ A        in float32, rounded once to the type of the result

(Upstream rounds B @ A, its scaling and the sum; up to 2 bf16 steps away from this. peft rounds B @ A and the sum.)

A merged tensor is computed tile by tile. The tiles lie at fixed places of the logical tensor, so its values do not
depend on the box, the layout or the thread that asks for it, and memory holds a few tiles, not the tensor.
"""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch

from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.adapters.tied import untied_model
from mindspeed_llm.checkpoint.formats.lazy import TensorSource
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.tables import WeightTable, is_lora
from mindspeed_llm.errors import InputError

TILE_COLUMNS = 2048
TILE_ELEMENTS = 1 << 20
"""4 MiB of float32."""
KEPT_TILES = 8
"""Tiles remembered, in the result's type: neighbouring boxes share them."""


def merged_weight(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + scaling * B @ A in float32.

    Args:
        weight: [out, in].
        a: [r, in].
        b: [out, r].
    """
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling)


class MergedSource:
    """A base with an adapter merged in, and/or in another type (`TensorSource`)."""

    def __init__(self, base: TensorSource, lora: LoraSource | None = None, dtype: torch.dtype | None = None) -> None:
        """Wrap `base`.

        Args:
            lora: the adapter; None to change the type only. Several are `combine`d into one first.
            dtype: of every tensor read; None keeps each tensor's own.
        """
        self.base = base
        self.lora = lora
        self.result_dtype = dtype
        self.config = base.config
        self.table = base.table
        if lora is not None and lora.unties:
            self.config = untied_model(base.config)
            self.table = WeightTable(self.config)
        if dtype is not None:
            self.config = dataclasses.replace(self.config, dtype=str(dtype).removeprefix("torch."))
        self.replaced = set(lora.whole()) if lora else set()
        self.adapted = {f"{module}.weight" for module in lora.modules()} if lora else set()
        self.lock = threading.Lock()
        self.tiles: OrderedDict[tuple[str, int, int], torch.Tensor] = OrderedDict()

    def names(self) -> list[str]:
        """Logical names: those of the base, and the output layer where the adapter unties it."""
        return list(self.table.entries) if self.table is not self.base.table else self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values `read` returns."""
        kept = not is_lora(name) and self.table.entry(name).row.keep_dtype
        return self.base.dtype(name) if kept else self.result_dtype or self.base.dtype(name)

    def read(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The logical tensor, or a box of it."""
        name = name if self.lora is None else self.table.resolve(name)
        if name not in self.adapted:
            return self.rounded(name, self.unmerged(name, rows, columns))
        height, width = self.shape(name)
        rows = [(0, height)] if rows is None else rows
        columns = [(0, width)] if columns is None else columns
        values = torch.empty(total(rows), total(columns), dtype=self.dtype(name))
        tile_rows, tile_columns = self.tile_shape(name)
        for across in pieces(columns, tile_columns):
            for down in pieces(rows, tile_rows):
                tile = self.tile(name, down.tile, across.tile)
                values[down.target, across.target] = tile[down.within, across.within]
        return values

    def unmerged(self, name: str, rows: Ranges | None, columns: Ranges | None) -> torch.Tensor:
        """A box of the tensor the adapter's factors are added to."""
        source = self.lora.tensors if name in self.replaced else self.base
        return source.read(name, rows, columns)

    def tile_shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of a tile; DoRA needs whole rows."""
        width = self.shape(name)[1]
        columns = width if name.removesuffix(".weight") in self.lora.magnitudes else min(width, TILE_COLUMNS)
        return max(1, TILE_ELEMENTS // max(1, columns)), columns

    def tile(self, name: str, down: int, across: int) -> torch.Tensor:
        """One merged tile, rounded; computed unless it is among the last ones."""
        key = (name, down, across)
        with self.lock:
            if key in self.tiles:
                self.tiles.move_to_end(key)
                return self.tiles[key]
        shape, step = self.shape(name), self.tile_shape(name)
        rows, columns = (
            [(number * size, min(whole, (number + 1) * size))]
            for number, size, whole in zip((down, across), step, shape, strict=True)
        )
        module = name.removesuffix(".weight")
        a = self.lora.tensors.read(f"{module}.lora_A.weight", None, columns)
        b = self.lora.tensors.read(f"{module}.lora_B.weight", rows)
        merged = merged_weight(self.unmerged(name, rows, columns), a, b, self.lora.settings.scaling(module))
        if module in self.lora.magnitudes:
            merged = with_magnitudes(merged, self.lora.magnitudes[module].read(rows))
            # Rows that DoRA leaves alone have no pair either: their product is zero.
        tile = self.rounded(name, merged)
        with self.lock:
            self.tiles[key] = tile
            while len(self.tiles) > KEPT_TILES:
                self.tiles.popitem(last=False)
        return tile

    def rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """`values` in the result's type; `InputError` when a finite value would become infinite."""
        result = values.to(self.dtype(name))
        if result.dtype != values.dtype and result.dtype == torch.float16 and not torch.isfinite(result).all():
            largest = values.abs().max().item()
            raise InputError(
                f"{name}: {largest:g} does not fit float16 (at most 65504); choose --params-dtype bf16 or fp32"
            )
        return result


def with_magnitudes(merged: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """DoRA: each row of W + scaling * B @ A brought to its length (Liu et al., arXiv 2402.09353); NaN keeps a row."""
    factors = magnitudes.float() / merged.norm(dim=1)
    return torch.where(magnitudes.isnan()[:, None], merged, merged * factors[:, None])


@dataclasses.dataclass(frozen=True)
class Piece:
    """Places along one dimension that a box takes from one tile.

    Attributes:
        tile: its number.
        within: the places within the tile.
        target: where they go in the box.
    """

    tile: int
    within: slice
    target: slice


def pieces(ranges: Ranges, size: int) -> Iterator[Piece]:
    """The pieces that ranges are cut into by tiles of `size`, in the box's order."""
    position = 0
    for start, stop in ranges:
        while start < stop:
            number = start // size
            end = min(stop, (number + 1) * size)
            count = end - start
            within = slice(start - number * size, end - number * size)
            yield Piece(number, within, slice(position, position + count))
            position, start = position + count, end


def total(ranges: Sequence[tuple[int, int]]) -> int:
    """Places in all ranges."""
    return sum(stop - start for start, stop in ranges)
