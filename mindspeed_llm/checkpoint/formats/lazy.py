"""Tensors that lie in a file and are read range by range, and how parts of one are put together.

Reading is by `preadv` into fresh memory, not by mapping: mapped pages would count as resident memory, and what a
tensor's read costs is then exactly its bytes.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mindspeed_llm.checkpoint.kinds import AxisMap, Ranges
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig

READ_LIMIT = 1 << 30
"""Bytes of one system call; Linux cuts a longer read at 2 GiB."""


class Readable(Protocol):
    """A tensor that can be read in ranges."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, dim: int | None = None, ranges: Ranges | None = None) -> torch.Tensor:
        """The tensor, or its `ranges` along `dim` joined in order."""
        ...


class TensorSource(Protocol):
    """A model's tensors by logical name, wherever they lie. Only what `read` asks for is read."""

    config: ModelConfig
    table: WeightTable

    def names(self) -> list[str]:
        """Logical names, in the order of the network."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values `read` returns."""
        ...

    def read(self, name: str, dim: int | None = None, ranges: Ranges | None = None) -> torch.Tensor:
        """The logical tensor, or its `ranges` along `dim` joined in order."""
        ...


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file.

    Attributes:
        path: the file.
        offset: of its first element, in bytes.
        dtype: element type; little-endian.
        shape: in elements.
        stride: in elements; None for a contiguous tensor.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.dtype.itemsize * element_count(self.shape)

    def read(self, dim: int | None = None, ranges: Ranges | None = None) -> torch.Tensor:
        """The tensor, or its `ranges` along `dim` joined in order; rows (`dim` 0) are read alone."""
        if self.stride is not None and not is_contiguous(self.shape, self.stride):
            span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
            whole = read_values(self.path, self.dtype, [(self.offset, max(span, 0))], 0)
            return narrow(whole.as_strided(self.shape, self.stride), dim, ranges).contiguous()
        if ranges is None or dim != 0:
            values = read_values(self.path, self.dtype, [(self.offset, element_count(self.shape))], 0)
            return narrow(values.view(self.shape), dim, ranges)
        if any(not 0 <= start <= stop <= self.shape[0] for start, stop in ranges):
            raise IndexError(f"{self.path}: rows {list(ranges)} of a tensor of {self.shape[0]} rows")
        row = element_count(self.shape[1:])
        spans = [(self.offset + start * row * self.dtype.itemsize, (stop - start) * row) for start, stop in ranges]
        rows = sum(stop - start for start, stop in ranges)
        return read_values(self.path, self.dtype, spans, rows * row).view(rows, *self.shape[1:])


def element_count(shape: Sequence[int]) -> int:
    """Number of elements of a shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether these strides are those of a contiguous tensor (dimensions of size 1 do not matter)."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def narrow(tensor: torch.Tensor, dim: int | None, ranges: Ranges | None) -> torch.Tensor:
    """`ranges` of `tensor` along `dim`, joined in order; the tensor itself when there are none given."""
    if ranges is None or dim is None:
        return tensor
    pieces = [tensor.narrow(dim, start, stop - start) for start, stop in ranges or [(0, 0)]]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim)


def read_values(path: Path, dtype: torch.dtype, spans: list[tuple[int, int]], count: int) -> torch.Tensor:
    """Elements of a file: `spans` are (byte offset, elements), joined in order into one flat tensor.

    Args:
        count: their sum; 0 to add them up here.

    Raises:
        InputError: the file is missing or ends early.
    """
    values = torch.empty(count or sum(elements for _, elements in spans), dtype=dtype)
    memory = memoryview(values.view(torch.uint8).numpy()) if values.numel() else memoryview(b"")
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        done = 0
        for offset, elements in spans:
            size = elements * dtype.itemsize
            read_into(path, descriptor, offset, memory[done : done + size])
            done += size
    finally:
        os.close(descriptor)
    return values


def read_into(path: Path, descriptor: int, offset: int, memory: memoryview) -> None:
    """Fill `memory` from a file position; `InputError` when the file ends early."""
    done = 0
    while done < len(memory):
        got = os.preadv(descriptor, [memory[done : done + READ_LIMIT]], offset + done)
        if got == 0:
            raise InputError(
                f"{path}: ends at byte {offset + done}, the tensor needs {len(memory) - done} more; truncated"
            )
        done += got


def assemble(
    parts: Sequence[Readable], axis: AxisMap, dim: int | None = None, ranges: Ranges | None = None
) -> torch.Tensor:
    """A logical tensor, or its `ranges` along `dim`, read from its parts."""
    if axis.dim is None:
        return parts[0].read(dim, ranges)
    across = dim is not None and dim != axis.dim and ranges is not None
    places = axis.locate(None if across or dim is None else ranges)
    if across:
        read = {part: parts[part].read(dim, ranges) for part in dict.fromkeys(place[0] for place in places)}
        pieces = [read[part].narrow(axis.dim, start, stop - start) for part, start, stop in places]
    else:
        pieces = [parts[part].read(axis.dim, [(start, stop)]) for part, start, stop in places]
    if not pieces:
        return parts[0].read(axis.dim, [(0, 0)])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis.dim)


def part_of(read: Callable[[int | None, Ranges | None], torch.Tensor], axis: AxisMap, part: int) -> torch.Tensor:
    """One part (an HF tensor or a rank's share) of a logical tensor that `read(dim, ranges)` gives, padded."""
    if axis.dim is None:
        return read(None, None)
    own = read(axis.dim, axis.part_ranges(part))
    if not axis.padding[part]:
        return own
    size = sum(segment.length for segment in axis.segments)
    last = read(axis.dim, [(size - 1, size)])
    return torch.cat([own, last.expand(axis.padding[part], *last.shape[1:])])


@dataclass(frozen=True)
class InMemory:
    """A tensor in memory, read like one in a file."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self.tensor.dtype

    def read(self, dim: int | None = None, ranges: Ranges | None = None) -> torch.Tensor:
        """The tensor, or its `ranges` along `dim` joined in order."""
        return narrow(self.tensor, dim, ranges)
