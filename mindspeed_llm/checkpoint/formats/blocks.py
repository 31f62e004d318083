"""Moving a tensor block by block, so that memory does not grow with its size."""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mindspeed_llm.checkpoint.formats.lazy import TensorSource, element_count, part_of
from mindspeed_llm.checkpoint.kinds import AxisMap
from mindspeed_llm.errors import InputError

BLOCK_BYTES = 2 << 20
"""Bytes read, changed and written at a time."""

Progress = Callable[[int], None]


def no_progress(nbytes: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's values go in a file that is open for writing.

    Attributes:
        descriptor: the file.
        offset: of the first element, in bytes.
        dtype: element type.
        shape: of the tensor as it is read; it lies there contiguous, or transposed.
        transposed: whether it lies there transposed.
    """

    descriptor: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool = False


def row_blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most `BLOCK_BYTES` (one row at least) that make up a tensor."""
    rows = shape[0] if shape else 1
    step = max(1, BLOCK_BYTES // max(1, element_count(shape[1:]) * itemsize))
    return ((start, min(rows, start + step)) for start in range(0, rows, step))


def part_blocks(
    source: TensorSource, name: str, axis: AxisMap, part: int, shape: tuple[int, ...]
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, values) of the blocks of one part of a logical tensor; `shape` is the part's."""
    for start, stop in row_blocks(shape, source.dtype(name).itemsize):
        yield start, part_of(functools.partial(source.read, name), axis, part, (start, stop))


def copy_part(
    source: TensorSource, name: str, axis: AxisMap, part: int, place: Place, progress: Progress = no_progress
) -> None:
    """Write one part of a logical tensor to its place.

    A transposed part is one expert's weight, which is read whole.
    """
    if place.transposed:
        values = part_of(functools.partial(source.read, name), axis, part)
        check_values(name, values, place, place.shape)
        write_values(place.descriptor, place.offset, values.t())
        progress(values.nbytes)
        return
    row_bytes = element_count(place.shape[1:]) * place.dtype.itemsize
    for start, values in part_blocks(source, name, axis, part, place.shape):
        check_values(name, values, place, (values.shape[0], *place.shape[1:]))
        write_values(place.descriptor, place.offset + start * row_bytes, values)
        progress(values.nbytes)


def check_values(name: str, values: torch.Tensor, place: Place, shape: tuple[int, ...]) -> None:
    """`InputError` when values are not of the type and shape that were announced for them."""
    if values.dtype != place.dtype or tuple(values.shape) != shape:
        raise InputError(
            f"{name}: announced as {place.dtype} {list(shape)}, arrives as {values.dtype} {list(values.shape)}"
        )


def write_values(descriptor: int, offset: int, values: torch.Tensor) -> None:
    """Write a tensor's bytes at a file position."""
    if not values.numel():
        return
    memory = memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())
    done = 0
    while done < len(memory):
        done += os.pwrite(descriptor, memory[done : done + (1 << 30)], offset + done)
