"""A training checkpoint in `torch_dist` form, opened with the interface of `mcore.MegatronCheckpoint`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mindspeed_llm.checkpoint.formats.contents import Contents
from mindspeed_llm.checkpoint.formats.mcore_names import lora_rank
from mindspeed_llm.checkpoint.formats.torch_dist import COMMON, TorchDistSource, check_backend, checkpoint_folder
from mindspeed_llm.checkpoint.formats.torch_dist_file import ChunkedTensor, StoredTensor, read_index
from mindspeed_llm.checkpoint.formats.torch_dist_names import OPTIMIZER, spellings
from mindspeed_llm.checkpoint.formats.torch_dist_shards import STATE_KEYS, STATE_PREFIX, STEP, rng_file
from mindspeed_llm.checkpoint.formats.torch_file import read_torch_file
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.layout import Layout, Rank
from mindspeed_llm.checkpoint.metadata import FILE, LoraSettings, Metadata, read_metadata
from mindspeed_llm.checkpoint.tables import WeightTable, is_lora
from mindspeed_llm.checkpoint.upstream_args import check_recorded
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig


class DistTensors:
    """Tensors of one section of a training checkpoint, by logical name (`TensorSource`).

    Attributes:
        known_hash: the content hash, once somebody asked for it (`open.source_hash`).
    """

    known_hash: str | None = None

    def __init__(self, checkpoint: "DistCheckpoint", tensors: Mapping[str, ChunkedTensor]) -> None:
        """Show `tensors` of an opened checkpoint."""
        self.path, self.notes = checkpoint.folder, checkpoint.notes
        self.metadata, self.config, self.table = checkpoint.metadata, checkpoint.config, checkpoint.table
        self.tensors = tensors

    def names(self) -> list[str]:
        """Logical names."""
        return list(self.tensors)

    def chunked(self, name: str) -> ChunkedTensor:
        """What a tensor is made of; `InputError` when the checkpoint has none of that name."""
        name = self.table.resolve(name)
        if name not in self.tensors:
            raise InputError(f"{self.path}: no tensor {name}")
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        return self.chunked(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values in the files."""
        return self.chunked(name).dtype

    def read(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The logical tensor, or a box of it."""
        return self.chunked(name).read(rows, columns)


class DistCheckpoint(Contents):
    """One iteration folder that training wrote as `torch_dist`: the index is read, tensors are not."""

    def __init__(self, path: str | Path) -> None:
        """Open a run or iteration folder.

        Raises:
            InputError: files missing or broken, or written by another program.
        """
        self.folder = checkpoint_folder(path)
        check_backend(self.folder)
        metadata = read_metadata(self.folder)
        if metadata is None:
            raise InputError(
                f"{self.folder}: has no {FILE}: another program's torch_dist gives weights only, as --load"
            )
        self.metadata: Metadata = metadata
        self.first: dict[str, Any] = read_torch_file(self.folder / COMMON)
        if not isinstance(self.first, dict):
            raise InputError(f"{self.folder / COMMON}: is no dictionary; the checkpoint is damaged")
        if STEP in self.first:
            self.first["optimizer"] = {"step": self.first[STEP]}
        check_recorded(self.first.get("args"), metadata.model, str(self.folder))
        self.config: ModelConfig = metadata.model
        self.layout: Layout = metadata.layout
        self.table = WeightTable(self.config)
        self.stored, _ = read_index(self.folder)
        self.notes: list[str] = []
        self.tensors = self.collect({key: one for key, one in self.stored.items() if not OPTIMIZER.match(key)})

    def collect(self, stored: Mapping[str, StoredTensor]) -> dict[str, ChunkedTensor]:
        """The tensors among these keys, by logical name; `InputError` for one of a wrong shape."""
        found: dict[str, ChunkedTensor] = {}
        for entry in self.table.entries.values():
            for option in spellings(entry):
                if len(option.keys) > 1 or option.keys[0] not in stored:
                    continue
                one, leading = stored[option.keys[0]], len(option.axes)
                if one.shape != (*option.axes, *entry.shape):
                    raise InputError(
                        f"{self.folder}: {option.keys[0]} has shape {list(one.shape)}, its settings ask for "
                        f"{[*option.axes, *entry.shape]}"
                    )
                chunks = one.by_place(leading)[option.place]
                found[entry.name] = ChunkedTensor(entry.shape, one.dtype, option.place, tuple(chunks))
                break
        for key, one in stored.items():
            if is_lora(key):
                wanted = self.table.shape(key, lora_rank(key, one.shape))
                if one.shape != wanted:
                    raise InputError(f"{self.folder}: {key} has shape {list(one.shape)}, expected {list(wanted)}")
                found[key] = ChunkedTensor(one.shape, one.dtype, (), one.chunks)
        return found

    def base(self) -> TorchDistSource:
        """The base weights; `InputError` when some are missing."""
        self.base_names()
        return TorchDistSource(self.folder)

    def lora(self, settings: LoraSettings | None = None) -> DistTensors:
        """The LoRA factors, and what is trained whole by `settings`; `InputError` when there are no factors."""
        return DistTensors(self, {name: self.tensors[name] for name in self.adapter_names(settings)})

    def section(self, *path: str) -> DistTensors:
        """`section("optimizer", "exp_avg")`: a field of the optimizer's state, by the parameter's logical name."""
        prefix = f"{STATE_PREFIX}{STATE_KEYS[path[-1]]}."
        own = {key.removeprefix(prefix): one for key, one in self.stored.items() if key.startswith(prefix)}
        return DistTensors(self, self.collect(own))

    def rng_states(self, place: Rank) -> list[Any] | None:
        """The random states of the data-parallel ranks of one place; None where none were saved."""
        path = self.folder / rng_file(place)
        return read_torch_file(path) if path.is_file() else None
