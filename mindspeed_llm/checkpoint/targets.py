"""What a conversion writes: an HF folder, rank files, or a torch_dist checkpoint. Each knows its tensors and bytes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from mindspeed_llm.checkpoint.adapters.export import write_into
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.formats.blocks import BLOCK_BYTES, Progress
from mindspeed_llm.checkpoint.formats.hf import plan_shards, shard_files, write_hf
from mindspeed_llm.checkpoint.formats.lazy import TensorSource, element_count
from mindspeed_llm.checkpoint.formats.mcore_names import Dialect, FileTensor, factor_tensors, file_tensors
from mindspeed_llm.checkpoint.formats.mcore_writer import check_layout, write_factors, write_mcore
from mindspeed_llm.checkpoint.formats.torch_dist_writer import write_torch_dist
from mindspeed_llm.checkpoint.kinds import padded_vocabulary
from mindspeed_llm.checkpoint.layout import CHECKPOINT_FILE, Layout, Rank


class Row(NamedTuple):
    """One tensor that will be written.

    Attributes:
        names: logical names of what it holds.
        file: relative to the result's folder.
        key: its name there.
        shape, dtype: as it is stored.
    """

    names: tuple[str, ...]
    file: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return element_count(self.shape) * self.dtype.itemsize


class Target(Protocol):
    """One way to write a model."""

    def check(self, source: TensorSource) -> None:
        """`UsageError` when the model does not fit, before anything is written."""
        ...

    def rows(self, source: TensorSource) -> Iterator[Row]:
        """Every tensor of the result."""
        ...

    def write(self, source: TensorSource, folder: Path, progress: Progress) -> None:
        """Write the tensors into an existing folder."""
        ...


@dataclass(frozen=True)
class HfFolder:
    """Safetensors under hub names; `shard_bytes` limits a file."""

    shard_bytes: int

    def check(self, source: TensorSource) -> None:
        """Every model fits."""

    def rows(self, source: TensorSource) -> Iterator[Row]:
        """Every HF tensor, by file."""
        held: dict[str, list[str]] = {}
        for entry in source.table.entries.values():
            for hf in entry.hf:
                held.setdefault(hf.name, []).append(entry.name)
        shards = plan_shards(source, self.shard_bytes)
        for file, tensors in zip(shard_files(len(shards)), shards, strict=True):
            for key, (dtype, shape) in tensors.items():
                yield Row(tuple(held[key]), file, key, shape, dtype)

    def write(self, source: TensorSource, folder: Path, progress: Progress) -> None:
        """Write the safetensors and their index."""
        write_hf(source, folder, self.shard_bytes, progress)


def rank_rows(source: TensorSource, layout: Layout, tensors: Callable[[Rank, int], list[FileTensor]]) -> Iterator[Row]:
    """The tensors of every rank file; `tensors` gives those of a rank's chunk, by its virtual rank."""
    for rank in layout.ranks():
        file = f"{layout.rank_folder(*rank)}/{CHECKPOINT_FILE}"
        for vp_rank, model in enumerate(layout.model_keys()):
            for one in tensors(rank, vp_rank):
                names = tuple(share.name for share in one.shares)
                yield Row(names, file, f"{model}/{one.key}", one.shape, source.dtype(names[0]))


@dataclass(frozen=True)
class RankFiles:
    """Per-rank torch files of a layout.

    Attributes:
        dialect: whose names.
        divisible_by: of the padded vocabulary, times the tensor parallel size.
        iteration: stored in the files.
    """

    layout: Layout
    dialect: Dialect
    divisible_by: int
    iteration: int

    def check(self, source: TensorSource) -> None:
        """`UsageError` when a tensor, the layers or the experts do not divide."""
        check_layout(source.table, self.layout, self.padded(source))

    def padded(self, source: TensorSource) -> int:
        """Rows of the embedding over all ranks."""
        return padded_vocabulary(source.config.vocab_size, self.layout.tp, self.divisible_by)

    def rows(self, source: TensorSource) -> Iterator[Row]:
        """Every tensor of every file: replicated ones and a tied output layer count as often as they are stored."""
        padded = self.padded(source)
        return rank_rows(
            source,
            self.layout,
            lambda rank, vp: file_tensors(source.table, self.layout, rank, vp, self.dialect, padded),
        )

    def write(self, source: TensorSource, folder: Path, progress: Progress) -> None:
        """Write the rank files."""
        write_mcore(source, folder, self.layout, self.iteration, self.divisible_by, progress, self.dialect)


@dataclass(frozen=True)
class TorchDist:
    """megatron-core's reshardable format; `iteration` is stored in it."""

    iteration: int

    def check(self, source: TensorSource) -> None:
        """Every model fits: there is no layout."""

    def rows(self, source: TensorSource) -> Iterator[Row]:
        """Every logical tensor, whole."""
        for name in source.names():
            yield Row((name,), "*.distcp", name, source.table.shape(name), source.dtype(name))

    def write(self, source: TensorSource, folder: Path, progress: Progress) -> None:
        """Write its files."""
        write_torch_dist(source, folder, progress, self.iteration)


@dataclass(frozen=True)
class FactorFiles:
    """An adapter alone as per-rank torch files; `iteration` is stored in them. The source is the adapter's tensors."""

    layout: Layout
    iteration: int

    def check(self, source: TensorSource) -> None:
        """`UsageError` when the adapted weights do not divide."""
        check_layout(source.table, self.layout)

    def rows(self, source: TensorSource) -> Iterator[Row]:
        """Every factor of every file."""
        return rank_rows(source, self.layout, lambda rank, vp: factor_tensors(source, self.layout, rank, vp))

    def write(self, source: TensorSource, folder: Path, progress: Progress) -> None:
        """Write the rank files."""
        write_factors(source, folder, self.layout, self.iteration, progress)


@dataclass(frozen=True)
class PeftFolder:
    """An adapter alone as peft loads it.

    Attributes:
        lora: the adapter, whose tensors are the source.
        base_path: what peft is to load the base from.
    """

    lora: LoraSource
    base_path: str

    def check(self, source: TensorSource) -> None:
        """Every adapter is tried when it is written."""

    def rows(self, source: TensorSource) -> Iterator[Row]:
        """Every logical tensor of the adapter; in the file fused ones are divided."""
        for name in source.names():
            yield Row((name,), "adapter_model.safetensors", name, source.shape(name), source.dtype(name))

    def write(self, source: TensorSource, folder: Path, progress: Progress) -> None:
        """Write the folder's files: small ones, all at once."""
        write_into(self.lora, folder, self.base_path)


PROCESS_BYTES = 340 << 20
"""Memory of a converting process before the first tensor: Python, torch and numpy, measured."""
BLOCKS = 6
"""Blocks in memory at once: one being written, two being hashed, and what joining or casting each of them takes."""
EXPERT_COPIES = 8
"""An expert's weight that lies transposed is read whole: its parts, joined, transposed; and what the allocator keeps.
Measured with weights of 25 MB: 7."""


def peak_memory(source: TensorSource, target: Target) -> int:
    """Bytes of memory a conversion takes: the process, its blocks, and one expert where experts lie transposed."""
    transposed = isinstance(target, RankFiles) and target.dialect.grouped and target.dialect.implementation == "local"
    stacked = {entry.row.stacked.value for entry in source.table.entries.values() if entry.expert is not None}
    largest = max(
        (
            element_count(entry.shape) * source.dtype(entry.name).itemsize
            for entry in source.table.entries.values()
            if entry.expert is not None
        ),
        default=0,
    )
    return (
        PROCESS_BYTES + BLOCKS * BLOCK_BYTES + (EXPERT_COPIES * largest if transposed or "transposed" in stacked else 0)
    )
