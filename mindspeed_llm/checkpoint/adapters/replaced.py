"""Tensors an adapter replaces whole (modules_to_save, biases, saved embeddings) or row by row (trained tokens)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mindspeed_llm.checkpoint.adapters.factors import Assembled, common_dtype, is_identity, same_values
from mindspeed_llm.checkpoint.adapters.peft_config import PeftConfig
from mindspeed_llm.checkpoint.adapters.peft_folder import PeftTensors
from mindspeed_llm.checkpoint.adapters.settings import peft_module
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, Readable, TensorSource, cut_ranges
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.tables import Entry, WeightTable
from mindspeed_llm.errors import InputError


@dataclass(frozen=True)
class BasePart:
    """One HF part of a base tensor, read through the logical one (`Readable`)."""

    base: TensorSource
    entry: Entry
    part: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The part's shape."""
        return self.entry.hf_shape(self.part)

    @property
    def dtype(self) -> torch.dtype:
        """The base's type."""
        return self.base.dtype(self.entry.name)

    def read(self, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The part, or a box of it."""
        ranges = self.entry.hf_map().part_ranges(self.part)
        if rows is not None:
            ranges = [one for start, stop in rows for one in cut_ranges(ranges, start, stop)]
        return self.base.read(self.entry.name, ranges, columns)


@dataclass(frozen=True)
class RowsReplaced:
    """A matrix some of whose rows come from another one (`Readable`).

    Attributes:
        inner: the matrix.
        rows: [count, columns], the rows that replace those of `numbers`.
        numbers: row numbers, no two alike.
    """

    inner: Readable
    rows: Readable
    numbers: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's shape."""
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
        """A type that holds both."""
        return torch.promote_types(self.inner.dtype, self.rows.dtype)

    def read(self, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The matrix, or a box of it."""
        values = self.inner.read(rows, columns).to(self.dtype)
        places = {number: place for place, number in enumerate(self.numbers)}
        position = 0
        for start, stop in rows if rows is not None else [(0, self.shape[0])]:
            for number in sorted(number for number in places if start <= number < stop):
                own = self.rows.read([(places[number], places[number] + 1)], columns)
                values[position + number - start] = own[0].to(values.dtype)
            position += stop - start
        return values


@dataclass(frozen=True)
class SourceTensor:
    """One logical tensor of a source (`Readable`)."""

    source: TensorSource
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.source.shape(self.name)

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        return self.source.dtype(self.name)

    def read(self, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The tensor, or a box of it."""
        return self.source.read(self.name, rows, columns)


def whole_tensors(
    found: PeftTensors, config: PeftConfig, base: TensorSource, table: WeightTable
) -> dict[str, Readable]:
    """The logical tensors an adapter replaces; parts that it does not hold are the base's.

    Args:
        table: with an output layer of its own.

    Raises:
        InputError: a tensor the base has no place for, or of another shape.
    """
    parts: dict[str, dict[int, LazyTensor]] = {}
    named = {f"{peft_module(name)}.weight": name for name in table.hf_names if name.endswith(".weight")}
    for given, tensor in found.whole.items():
        name = named.get(given, given)
        if name not in table.hf_names:
            raise InputError(f"{config.path.parent}: {name} is unknown to a {table.config.family} model")
        entry, part = table.hf_names[name]
        stored = BasePart(base, entry, part)
        if tensor.shape != entry.stored_shape(part):
            raise InputError(
                f"{config.path.parent}: {name} has shape {list(tensor.shape)}, the base has"
                f" {list(entry.stored_shape(part))}; give the base it was trained on, resized likewise"
            )
        # peft saves an embedding that has factors along with them, as it was; that replaces nothing.
        if config.saves(given.removesuffix(".weight")) or not same_values(tensor, stored):
            parts.setdefault(entry.name, {})[part] = tensor
    return {name: completed(table.entries[name], own, base) for name, own in parts.items()}


def completed(entry: Entry, own: Mapping[int, LazyTensor], base: TensorSource) -> Readable:
    """The logical tensor of an adapter's parts and the base's."""
    axis = entry.hf_map()
    if len(entry.hf) == 1 and is_identity(axis):
        return own[0]
    parts = [own.get(part) or BasePart(base, entry, part) for part in range(len(entry.hf))]
    return Assembled(tuple(parts), axis, entry.shape, common_dtype([part.dtype for part in parts], []))


def token_tensors(
    found: PeftTensors, config: PeftConfig, base: TensorSource, table: WeightTable, replaced: Mapping[str, Readable]
) -> dict[str, Readable]:
    """Vocabulary tables in which trained tokens have rows of their own; `InputError` when the config names none."""
    tensors: dict[str, Readable] = {}
    for module, rows in found.tokens.items():
        numbers = token_numbers(config, module)
        name = f"{module}.weight"
        if name not in table.hf_names:
            raise InputError(f"{config.path.parent}: {module} is unknown to a {table.config.family} model")
        entry = table.hf_names[name][0]
        inside = all(0 <= number < entry.shape[0] for number in numbers) and len(set(numbers)) == len(numbers)
        if rows.shape != (len(numbers), entry.shape[1]) or not inside:
            raise InputError(
                f"{config.path}: trainable_token_indices names {len(numbers)} rows of {module}; the file holds"
                f" {list(rows.shape)} for a table of {list(entry.shape)}"
            )
        inner = replaced.get(entry.name) or SourceTensor(base, entry.name)
        tensors[entry.name] = RowsReplaced(inner, rows, numbers)
    return tensors


def token_numbers(config: PeftConfig, module: str) -> tuple[int, ...]:
    """The trained rows of a module."""
    said = config.trainable_token_indices
    if isinstance(said, Mapping):
        said = next((tuple(rows) for name, rows in said.items() if module.endswith(name)), None)
    if not said:
        raise InputError(f"{config.path}: trainable_token_indices names no rows of {module}, which the file holds")
    return tuple(said)
