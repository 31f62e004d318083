"""Tensors that lie in a file and are read box by box, and how parts of one are put together.

A *box* is ranges of rows and ranges of columns, joined in order. Rows of a contiguous tensor are read by `preadv` into
fresh memory; any other box is copied out of a short-lived mapping, which touches only the pages it needs. So a read
costs its own bytes of memory, nothing stays mapped, and a column share does not read the whole tensor.
"""

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from mindspeed_llm.checkpoint.kinds import AxisMap, Ranges
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig

MANY_RANGES = 64
"""Above this, one gather is faster than joining slices."""
READ_LIMIT = 1 << 30
"""Bytes of one system call; Linux cuts a longer read at 2 GiB."""
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""numpy types that carry values of any torch type of that size."""


class Readable(Protocol):
    """A tensor that can be read box by box."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The tensor, or a box of it."""
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

    def read(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The logical tensor, or a box of it."""
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

    def expert(self, number: int, transposed: bool = False) -> "LazyTensor":
        """One expert of a tensor [experts, ...], transposed back where it is stored transposed."""
        shape = self.shape[1:]
        offset = self.offset + number * element_count(shape) * self.dtype.itemsize
        if transposed:
            return LazyTensor(self.path, offset, self.dtype, shape[::-1], (1, shape[1]))
        return LazyTensor(self.path, offset, self.dtype, shape)

    def row_slice(self, start: int, stop: int) -> "LazyTensor":
        """Rows `start` to `stop` of a contiguous tensor."""
        offset = self.offset + start * element_count(self.shape[1:]) * self.dtype.itemsize
        return LazyTensor(self.path, offset, self.dtype, (stop - start, *self.shape[1:]), self.stride)

    def read(self, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The tensor, or a box of it; `InputError` when the file ends early."""
        check_box(self.path, self.shape, rows, columns)
        contiguous = self.stride is None or is_contiguous(self.shape, self.stride)
        if not contiguous or columns is not None:
            with self.mapped() as values:
                box = np.ascontiguousarray(narrow_array(values, rows, columns))
                box = box.copy() if np.may_share_memory(box, values) else box
                return torch.from_numpy(box).view(self.dtype)
        if rows is None:
            return read_values(self.path, self.dtype, [(self.offset, element_count(self.shape))]).view(self.shape)
        row = element_count(self.shape[1:])
        spans = [(self.offset + start * row * self.dtype.itemsize, (stop - start) * row) for start, stop in rows]
        count = sum(stop - start for start, stop in rows)
        return read_values(self.path, self.dtype, spans).view(count, *self.shape[1:])

    @contextlib.contextmanager
    def mapped(self) -> Iterator[np.ndarray]:
        """The values as an array over a mapping that ends with the block."""
        size = self.dtype.itemsize
        stride = self.stride or contiguous_stride(self.shape)
        span = 1 + sum((length - 1) * step for length, step in zip(self.shape, stride, strict=True))
        if not element_count(self.shape):
            yield np.empty(self.shape, RAW[size])
            return
        begin = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        end = self.offset + span * size
        with open_to_read(self.path) as descriptor:
            if os.fstat(descriptor).st_size < end:
                raise InputError(f"{self.path}: ends before byte {end}, which a tensor needs; truncated")
            mapping = mmap.mmap(descriptor, end - begin, access=mmap.ACCESS_READ, offset=begin)
        strides = [step * size for step in stride]
        yield np.ndarray(self.shape, RAW[size], mapping, self.offset - begin, strides)
        # The mapping ends with its last reference, the array above.


def check_box(path: Path, shape: Sequence[int], rows: Ranges | None, columns: Ranges | None) -> None:
    """`IndexError` when a box reaches outside the tensor."""
    for dim, ranges in enumerate((rows, columns)):
        if ranges is not None and any(not 0 <= start <= stop <= shape[dim] for start, stop in ranges):
            raise IndexError(f"{path}: {list(ranges)} of dimension {dim}, which has {shape[dim]}")


def element_count(shape: Sequence[int]) -> int:
    """Number of elements of a shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def listed(names: Iterable[str], count: int = 5) -> str:
    """The first names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{names[:count]}{more}"


def is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether these strides are those of a contiguous tensor (dimensions of size 1 do not matter)."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    return tuple(element_count(shape[dim + 1 :]) for dim in range(len(shape)))


def narrow_array(values: np.ndarray, rows: Ranges | None, columns: Ranges | None) -> np.ndarray:
    """A box of an array: a view where one range suffices, else a copy."""
    for dim, ranges in enumerate((rows, columns)):
        if ranges is None:
            continue
        if len(ranges) == 1:
            values = values[(slice(None),) * dim + (slice(*ranges[0]),)]
        else:
            places = [np.arange(start, stop) for start, stop in ranges] or [np.arange(0)]
            values = np.take(values, np.concatenate(places), axis=dim)
    return values


def narrow(tensor: torch.Tensor, rows: Ranges | None, columns: Ranges | None = None) -> torch.Tensor:
    """A box of a tensor in memory; the tensor itself when nothing is cut."""
    for dim, ranges in enumerate((rows, columns)):
        if ranges is None:
            continue
        if len(ranges) > MANY_RANGES:
            places = torch.cat([torch.arange(start, stop) for start, stop in ranges])
            tensor = tensor.index_select(dim, places)
            continue
        pieces = [tensor.narrow(dim, start, stop - start) for start, stop in ranges or [(0, 0)]]
        tensor = pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim)
    return tensor


@contextlib.contextmanager
def open_to_read(path: Path) -> Iterator[int]:
    """A file descriptor; `InputError` when the file cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_values(path: Path, dtype: torch.dtype, spans: list[tuple[int, int]]) -> torch.Tensor:
    """Elements of a file: `spans` are (byte offset, elements), joined in order into one flat tensor.

    Raises:
        InputError: the file is missing or ends early.
    """
    values = torch.empty(sum(elements for _, elements in spans), dtype=dtype)
    memory = memoryview(values.view(torch.uint8).numpy()) if values.numel() else memoryview(b"")
    with open_to_read(path) as descriptor:
        done = 0
        for offset, elements in spans:
            size = elements * dtype.itemsize
            read_into(path, descriptor, offset, memory[done : done + size])
            done += size
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
    parts: Sequence[Readable], axis: AxisMap, rows: Ranges | None = None, columns: Ranges | None = None
) -> torch.Tensor:
    """A logical tensor, or a box of it, read from its parts."""
    if axis.dim is None:
        return parts[0].read(rows, columns)

    def box(part: int, along: Ranges) -> torch.Tensor:
        return parts[part].read(along, columns) if axis.dim == 0 else parts[part].read(rows, along)

    places = axis.locate(rows if axis.dim == 0 else columns)
    if len({part for part, _, _ in places}) <= 1:
        return box(places[0][0] if places else 0, [(start, stop) for _, start, stop in places])
    return torch.cat([box(part, [(start, stop)]) for part, start, stop in places], axis.dim)


def part_of(
    read: Callable[[Ranges | None, Ranges | None], torch.Tensor],
    axis: AxisMap,
    part: int,
    rows: tuple[int, int] | None = None,
) -> torch.Tensor:
    """One part (an HF tensor or a rank's share) of a logical tensor, padded.

    Args:
        read: gives a box (rows, columns) of the logical tensor.
        rows: the part's own rows to give; None for all.
    """
    if axis.dim is None:
        return read(None if rows is None else [rows], None)
    if axis.dim == 1:
        return read(None if rows is None else [rows], axis.part_ranges(part))
    first, last = rows or (0, axis.part_size(part))
    held = axis.part_size(part) - axis.padding[part]
    own = read(cut_ranges(axis.part_ranges(part), first, min(last, held)), None)
    padding = last - max(first, held)
    if padding <= 0:
        return own
    size = sum(segment.length for segment in axis.segments)
    end = read([(size - 1, size)], None)
    return torch.cat([own, end.expand(padding, *end.shape[1:])])


def cut_ranges(ranges: Ranges, first: int, last: int) -> list[tuple[int, int]]:
    """Places `first` to `last` of the sequence that `ranges` make up."""
    found, position = [], 0
    for start, stop in ranges:
        low, high = max(first - position, 0), min(last - position, stop - start)
        if low < high:
            found.append((start + low, start + high))
        position += stop - start
    return found


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

    def read(self, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The tensor, or a box of it."""
        return narrow(self.tensor, rows, columns)
