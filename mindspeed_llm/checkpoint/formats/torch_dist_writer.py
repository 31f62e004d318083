"""Writing a model as a `torch_dist` checkpoint that megatron-core loads at any layout, block by block."""

import io
import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.metadata import Metadata as Index

from mindspeed_llm.checkpoint.atomic import write_text
from mindspeed_llm.checkpoint.formats.blocks import Place, Progress, copy_part, no_progress
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, TensorSource
from mindspeed_llm.checkpoint.formats.torch_dist import BACKEND, COMMON, SETTINGS
from mindspeed_llm.checkpoint.formats.torch_dist_file import METADATA
from mindspeed_llm.checkpoint.formats.torch_dist_names import Form, extra_state_keys, form_of, other_names, spell
from mindspeed_llm.checkpoint.formats.torch_file import write_skeleton, write_torch_file
from mindspeed_llm.checkpoint.kinds import whole_copies
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.tables import Entry
from mindspeed_llm.checkpoint.upstream_args import upstream_args
from mindspeed_llm.errors import UsageError

FILE_BYTES = 5_000_000_000
"""A file is closed once it is larger."""
VERSION = "1.0.0"
"""Of torch.distributed.checkpoint's format."""
CHECKPOINT_VERSION = 3.0
"""Megatron's version of common.pt."""


def write_torch_dist(
    source: TensorSource,
    folder: Path,
    progress: Progress = no_progress,
    iteration: int = 1,
    stacked: bool | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write all tensors of a source.

    Vocabulary tables are written without padding: megatron-core pads them as it loads. A norm is listed under its own
    name and under that of the linear layer after it, so that local and transformer_engine models both find it.

    Args:
        folder: the iteration folder, as a rule that of a `StagedDirectory`; its metadata.json, without which it is no
            checkpoint, is written last.
        progress: told the bytes of each block written.
        stacked: layers share tensors, as models expect whose layers are alike; None to do as megatron-core does.
        file_bytes: a new file is begun above this.

    Raises:
        UsageError: layers are to share tensors, but do not all have the same ones.
    """
    form = form_of(source.table)
    if stacked and not form.stacked:
        raise UsageError(f"the layers of this {source.config.family} model differ; they cannot share tensors")
    form = form if stacked is None else Form(stacked)
    with ShardFiles(folder, file_bytes) as files:
        for name in source.names():
            write_tensor(source, source.table.entry(name), form, files, progress)
        empty = files.add_bytes(saved([None]))
        for name in source.names():
            for key in extra_state_keys(source.table.entry(name), form):
                files.index.state_dict_metadata[key] = BytesStorageMetadata()
                files.index.storage_data[MetadataIndex(key)] = empty
    write_durably(folder / METADATA, pickle.dumps(files.index))
    layout = Layout.even(source.config.num_layers)
    args = upstream_args(source.config, layout, source.config.vocab_size, iteration)
    write_settings(folder, form, {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration}, {})


def write_settings(folder: Path, form: Form, common: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write common.pt, and metadata.json, without which a folder is no checkpoint.

    Args:
        about: what megatron-core has to know of the content besides the form of its names.
    """
    shown = {"non_homogeneous_layers": not form.stacked, "singleton_local_shards": False, **about}
    write_torch_file(folder / COMMON, {**common, "content_metadata": shown})
    settings = {"sharded_backend": BACKEND, "common_backend": "torch"}
    write_text(folder / SETTINGS, json.dumps({**settings, "sharded_backend_version": 1, "common_backend_version": 1}))


def write_tensor(source: TensorSource, entry: Entry, form: Form, files: "ShardFiles", progress: Progress) -> None:
    """Write one logical tensor as one chunk, and list it under every name it goes by."""
    found = spell(entry, form)
    dtype = source.dtype(entry.name)
    chunk = ((1,) * len(found.axes)) + entry.shape
    info, place = files.add_tensor(dtype, chunk, entry.shape)
    copy_part(source, entry.name, whole_copies(1), 0, place, progress)
    offset = found.place + (0,) * len(entry.shape)
    for name in (entry.name, *other_names(entry.name)):
        key = spell(entry, form, name).keys[0]
        about = files.index.state_dict_metadata.get(key)
        if about is None:
            about = TensorStorageMetadata(TensorProperties(dtype), torch.Size(found.axes + entry.shape), [])
            files.index.state_dict_metadata[key] = about
        files.index.storage_data[MetadataIndex(key, offset, len(about.chunks))] = info
        about.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(chunk)))


@dataclass(frozen=True)
class Frame:
    """The bytes of a torch file of one tensor before and after its values."""

    before: bytes
    after: bytes


@dataclass
class ShardFiles:
    """The `.distcp` files being written, and the index of what lies in them."""

    folder: Path
    file_bytes: int
    rank: int = 0
    index: Index = field(default_factory=lambda: Index({}, None, {}, StorageMeta(), VERSION))
    frames: dict[tuple[torch.dtype, tuple[int, ...]], Frame] = field(default_factory=dict)
    count: int = 0
    end: int = 0
    descriptor: int | None = None

    def __enter__(self) -> "ShardFiles":
        """Nothing is written before the first tensor."""
        return self

    def __exit__(self, *_: object) -> None:
        """Make the last file durable."""
        self.close()

    def close(self) -> None:
        """Make the open file durable, if there is one."""
        if self.descriptor is not None:
            os.fsync(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = None

    def reserve(self, size: int) -> _StorageInfo:
        """Room for `size` bytes, in a new file when the open one is full."""
        if self.descriptor is None or self.end > self.file_bytes:
            self.close()
            self.name = f"__{self.rank}_{self.count}.distcp"
            self.descriptor = os.open(self.folder / self.name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o640)
            self.count, self.end = self.count + 1, 0
        info = _StorageInfo(self.name, self.end, size)
        self.end += size
        os.ftruncate(self.descriptor, self.end)
        return info

    def add_bytes(self, data: bytes) -> _StorageInfo:
        """Write an object's bytes."""
        info = self.reserve(len(data))
        os.pwrite(self.descriptor, data, info.offset)
        return info

    def add_tensor(
        self, dtype: torch.dtype, chunk: tuple[int, ...], shape: tuple[int, ...]
    ) -> tuple[_StorageInfo, Place]:
        """Write the torch file of a tensor of shape `chunk` but for its values, which go to the place returned."""
        if (dtype, chunk) not in self.frames:
            self.frames[dtype, chunk] = frame(self.folder, dtype, chunk)
        made = self.frames[dtype, chunk]
        nbytes = LazyTensor(self.folder, 0, dtype, shape).nbytes
        info = self.reserve(len(made.before) + nbytes + len(made.after))
        values = info.offset + len(made.before)
        os.pwrite(self.descriptor, made.before, info.offset)
        os.pwrite(self.descriptor, made.after, values + nbytes)
        return info, Place(self.descriptor, values, dtype, shape)


def frame(folder: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Frame:
    """The bytes around the values of a tensor, taken from a torch file that torch writes without them."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".frame_") as aside:
        path = Path(aside, "tensor.pt")
        place = write_skeleton(path, torch.empty(shape, dtype=dtype))
        with path.open("rb") as file:
            before = file.read(place.offset)
            file.seek(place.offset + place.nbytes)
            return Frame(before, file.read())


def saved(value: object) -> bytes:
    """What `torch.save` makes of a small object."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file and make it durable."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
