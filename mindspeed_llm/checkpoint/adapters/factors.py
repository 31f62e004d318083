"""An adapter's tensors under logical names, and how factors that lie apart become one pair. Nothing is read early.

q  A1 B1                     A1             B1  .        rows of linear_qkv that q, k and v make up;
k  (not a target)     ->     A3      and    .   .        a part with the same A shares its rank,
v  A3 B3                                    .   B3       a part without a pair has rows of zeros
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from mindspeed_llm.checkpoint.formats.lazy import Readable, assemble, element_count, narrow
from mindspeed_llm.checkpoint.kinds import AxisMap, Ranges, Segment
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig

COMPARED_ELEMENTS = 1 << 22
"""Elements of two tensors compared at a time."""


class AdapterTensors:
    """The tensors of an adapter (`TensorSource`): factors, and whole tensors that replace the base's."""

    def __init__(self, path: Path, table: WeightTable, tensors: Mapping[str, Readable]) -> None:
        """Show `tensors`, given by logical name; `path` names the adapter in errors."""
        self.path = path
        self.table = table
        self.config: ModelConfig = table.config
        self.tensors = tensors

    def names(self) -> list[str]:
        """Logical names."""
        return list(self.tensors)

    def tensor(self, name: str) -> Readable:
        """One tensor; `InputError` when the adapter has none of that name."""
        if name not in self.tensors:
            raise InputError(f"{self.path}: no tensor {name}")
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        return self.tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values `read` returns."""
        return self.tensor(name).dtype

    def read(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The logical tensor, or a box of it."""
        return self.tensor(name).read(rows, columns)


class Pair(NamedTuple):
    """One LoRA pair as it lies in a file: W + scaling * b @ a. Shapes: a [rank, in], b [out, rank]."""

    a: Readable
    b: Readable
    scaling: float


class Placed(NamedTuple):
    """A pair that adapts one part of a logical weight's rows (all of them when there is one part)."""

    part: int
    pair: Pair


class Joined(NamedTuple):
    """The one pair of a logical module, and its scaling."""

    a: Readable
    b: Readable
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Assembled:
    """A tensor made of others by an `AxisMap`, in one type (`Readable`)."""

    parts: tuple[Readable, ...]
    axis: AxisMap
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The tensor, or a box of it."""
        return assemble(self.parts, self.axis, rows, columns).to(self.dtype)


@dataclass(frozen=True)
class Transposed:
    """A matrix turned round (`Readable`)."""

    inner: Readable

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the inner one, reversed."""
        return tuple(reversed(self.inner.shape))

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self.inner.dtype

    def read(self, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The tensor, or a box of it."""
        return self.inner.read(columns, rows).t().contiguous()


class Block(NamedTuple):
    """A B that fills the rows of one part and the columns from `column` on, times `factor`."""

    part: int
    b: Readable
    column: int
    factor: float


@dataclass(frozen=True)
class BlockB:
    """The B of a logical module, made of blocks; zero elsewhere (`Readable`)."""

    blocks: tuple[Block, ...]
    axis: AxisMap
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The tensor, or a box of it."""
        places = self.axis.locate(rows)
        count = sum(stop - start for _, start, stop in places)
        values = torch.zeros(count, self.shape[1], dtype=self.dtype)
        for block in self.blocks:
            ranges, targets, position = [], [torch.empty(0, dtype=torch.long)], 0
            for part, start, stop in places:
                if part == block.part:
                    ranges.append((start, stop))
                    targets.append(torch.arange(position, position + stop - start))
                position += stop - start
            own = block.b.read(ranges)
            own = own.to(self.dtype) * block.factor if block.factor != 1 else own.to(self.dtype)
            values[torch.cat(targets), block.column : block.column + own.shape[1]] = own
        return narrow(values, None, columns)


def join(axis: AxisMap, rows: int, placed: Sequence[Placed]) -> Joined:
    """One pair for a logical module whose parts have pairs of their own.

    Exact: equal A's are kept once, others are stacked, and B is zero where a part has no pair or another's rank. Where
    the parts' scalings differ, the ratio goes into B: exactly if it is a power of two, else in float32.

    Args:
        axis: how the parts make up the logical rows.
        rows: of the logical weight.
        placed: pairs by part; several may share a part, their products then add up.
    """
    scaling = usual_scaling([one.pair.scaling for one in placed])
    stacked: list[Readable] = []
    blocks: list[Block] = []
    for part, pair in placed:
        taken = {block.column for block in blocks if block.part == part}
        column = 0
        for a in stacked:
            if column not in taken and same_values(a, pair.a):
                break
            column += a.shape[0]
        else:
            stacked.append(pair.a)
        blocks.append(Block(part, pair.b, column, pair.scaling / scaling if scaling else 1.0))
    width = sum(a.shape[0] for a in stacked)
    dtype = common_dtype([pair.b.dtype for _, pair in placed], [block.factor for block in blocks])
    if len(blocks) == 1 and axis.parts == 1 and is_identity(axis) and blocks[0].factor == 1:
        return Joined(stacked[0], blocks[0].b, scaling)
    b = BlockB(tuple(blocks), axis, (rows, width), dtype)
    if len(stacked) == 1:
        return Joined(stacked[0], b, scaling)
    segments = tuple(Segment(number, 0, a.shape[0]) for number, a in enumerate(stacked))
    a_dtype = common_dtype([a.dtype for a in stacked], [])
    above = AxisMap(0, segments, (0,) * len(stacked))
    return Joined(Assembled(tuple(stacked), above, (width, stacked[0].shape[1]), a_dtype), b, scaling)


def usual_scaling(scalings: Sequence[float]) -> float:
    """The commonest scaling other than 0, the first of those that tie; 0 when there is no other."""
    counts = Counter(scaling for scaling in scalings if scaling)
    return counts.most_common(1)[0][0] if counts else 0.0


def common_dtype(dtypes: Sequence[torch.dtype], factors: Sequence[float]) -> torch.dtype:
    """A type that holds values of all `dtypes`, times all `factors`, unrounded where such a product exists.

    A power of two shifts the exponent only; float16 has too few exponents to rely on that.
    """
    found = dtypes[0]
    for dtype in dtypes[1:]:
        found = torch.promote_types(found, dtype)
    changed = [factor for factor in factors if factor != 1]
    shifts = all(factor != 0 and abs(math.frexp(factor)[0]) == 0.5 for factor in changed)
    if changed and (not shifts or found == torch.float16):
        found = torch.promote_types(found, torch.float32)
    return found


def is_identity(axis: AxisMap) -> bool:
    """Whether the single part of `axis` is the logical tensor itself."""
    return axis.dim == 0 and len(axis.locate()) == 1


def same_values(one: Readable, other: Readable) -> bool:
    """Whether two tensors are equal bit for bit, type included."""
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    step = max(1, COMPARED_ELEMENTS // max(1, element_count(one.shape[1:])))
    blocks = ([(start, min(one.shape[0], start + step))] for start in range(0, one.shape[0], step))
    return all(torch.equal(one.read(rows).view(bits), other.read(rows).view(bits)) for rows in blocks)


def untied(table: WeightTable) -> WeightTable:
    """The table with an output layer of its own, which an adapter may address even where the base ties it."""
    if not table.config.tie_word_embeddings:
        return table
    return WeightTable(dataclasses.replace(table.config, tie_word_embeddings=False))


def logical_tensors(
    joined: Mapping[str, Joined], replaced: Mapping[str, Readable], table: WeightTable
) -> dict[str, Readable]:
    """Everything by logical name, in the order of the network."""
    found: dict[str, Readable] = {}
    for name in table.entries:
        module = name.removesuffix(".weight")
        if name in replaced:
            found[name] = replaced[name]
        if name.endswith(".weight") and module in joined:
            found[f"{module}.lora_A.weight"] = joined[module].a
            found[f"{module}.lora_B.weight"] = joined[module].b
    return found
