"""Megatron checkpoints of per-rank `torch` files, read as logical tensors whatever their layout.

    <run>/latest_checkpointed_iteration.txt      "20" or "release"
    <run>/iter_0000020/args.json                 ours only
    <run>/iter_0000020/mp_rank_TT[_PPP]/model_optim_rng.pt

Written by upstream's converters, by training, or by us. The layout is found from folder names, keys and `args`, and
held against the tensors' shapes.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mindspeed_llm.checkpoint.atomic import TRACKER, iteration_folder
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, assemble
from mindspeed_llm.checkpoint.formats.torch_file import read_torch_file
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.layout import CHECKPOINT_FILE, RANK_FOLDER, Layout
from mindspeed_llm.checkpoint.metadata import FILE, Metadata, read_metadata
from mindspeed_llm.checkpoint.tables import (
    EMBEDDING,
    LAYER_NUMBER,
    LORA_NAME,
    OUTPUT_LAYER,
    WRAPPERS,
    WeightTable,
    is_lora,
    logical_name,
)
from mindspeed_llm.checkpoint.upstream_args import config_from_args
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families.base import Kind

MODEL_KEY = re.compile(r"^model\d*$")


def is_megatron(folder: str | Path) -> bool:
    """Whether a folder looks like a Megatron checkpoint: a tracker, or rank folders."""
    folder = Path(folder)
    return (folder / TRACKER).is_file() or any(folder.glob("mp_rank_*"))


def resolve(folder: str | Path) -> Path:
    """The iteration folder of a run folder (through its tracker), or the folder itself when it holds rank folders.

    Raises:
        InputError: neither, or the tracker points to nothing.
    """
    folder = Path(folder)
    tracker = folder / TRACKER
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8").strip()
        if text != "release" and not text.isdigit():
            raise InputError(f"{tracker}: says {text!r:.40}, expected an iteration number or release")
        found = folder / ("release" if text == "release" else iteration_folder(int(text)))
        if not found.is_dir():
            raise InputError(f"{tracker}: says {text}, but {found} does not exist; correct the tracker")
        return found
    if any(folder.glob("mp_rank_*")):
        return folder
    there = "" if folder.is_dir() else " (no such folder)"
    raise InputError(f"{folder}{there}: no Megatron checkpoint: neither {TRACKER} nor mp_rank_* folders")


class ShardedSource:
    """Tensors that lie in rank files, by logical name (`TensorSource`)."""

    def __init__(
        self, checkpoint: "MegatronCheckpoint", tensors: Mapping[str, list[LazyTensor]], padded_rows: int | None
    ) -> None:
        """`tensors` holds, for each logical name, one local tensor per tensor-parallel rank."""
        self.path = checkpoint.folder
        self.metadata = checkpoint.metadata
        self.config = checkpoint.config
        self.table = checkpoint.table
        self.tp = checkpoint.layout.tp
        self.tensors = tensors
        self.padded_rows = padded_rows

    def names(self) -> list[str]:
        """Logical names."""
        return list(self.tensors)

    def parts(self, name: str) -> list[LazyTensor]:
        """The ranks' shares of a tensor; `InputError` when the checkpoint has none."""
        name = self.table.resolve(name)
        if name not in self.tensors:
            raise InputError(f"{self.path}: no tensor {name}")
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        if not is_lora(name):
            return self.table.shape(name)
        local = self.parts(name)[0].shape
        return self.table.shape(name, local[0] if LORA_NAME.match(name)["factor"] == "lora_A" else local[1])

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values in the files."""
        return self.parts(name)[0].dtype

    def read(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The logical tensor, or a box of it, joined from the ranks' shares."""
        return assemble(self.parts(name), self.table.shard_map(name, self.tp, self.padded_rows), rows, columns)


class MegatronCheckpoint:
    """One iteration folder, opened: headers are read, tensors are not."""

    def __init__(self, path: str | Path, family_name: str | None = None, config: ModelConfig | None = None) -> None:
        """Open a run or iteration folder.

        Args:
            family_name: `--model-type-hf`, for checkpoints that do not say their family.
            config: the model, if known from an HF folder; it replaces the pickled args, not an args.json.

        Raises:
            InputError: files missing, truncated, or contradicting each other.
        """
        self.folder = resolve(path)
        self.metadata: Metadata | None = read_metadata(self.folder)
        self.files = read_ranks(self.folder)
        self.first = self.files[0, 0]
        self.layout = self.find_layout()
        if self.metadata:
            self.config: ModelConfig = self.metadata.model
        else:
            self.config = config or self.config_of_args(family_name)
        self.table = WeightTable(self.config)
        if self.config.num_layers != self.layout.num_layers:
            raise InputError(
                f"{self.folder}: the files hold {self.layout.num_layers} layers, its settings say"
                f" {self.config.num_layers}; a file is missing or from another model"
            )
        self.tensors = self.collect(())
        self.padded_rows = self.tensors[EMBEDDING][0].shape[0] * self.layout.tp if EMBEDDING in self.tensors else None
        self.check_shapes(self.tensors)

    def config_of_args(self, family_name: str | None) -> ModelConfig:
        """The model as the file's own args describe it."""
        for state in self.first.values():
            values = state.values() if isinstance(state, dict) else ()
            dtype = next((value.dtype for value in values if isinstance(value, LazyTensor)), None)
            if dtype is not None:
                return config_from_args(self.first.get("args"), str(self.folder), dtype, family_name)
        raise InputError(f"{self.folder}: its files hold no tensors")

    def find_layout(self) -> Layout:
        """The layout recorded in args.json, held against the files; else the one the files show."""
        tp = max(tp_rank for tp_rank, _ in self.files) + 1
        pp = max(pp_rank for _, pp_rank in self.files) + 1
        said = vars(self.first["args"]) if hasattr(self.first.get("args"), "__dict__") else {}
        if said.get("expert_model_parallel_size") not in (None, 1):
            raise InputError(f"{self.folder}: expert-parallel checkpoints are not supported yet")
        for key, found in (("tensor_model_parallel_size", tp), ("pipeline_model_parallel_size", pp)):
            if said.get(key, found) != found:
                raise InputError(
                    f"{self.folder}: args say {key} {said[key]}, the folders show {found}; files are missing"
                )
        if self.metadata:
            recorded = self.metadata.layout
            if (recorded.tp, recorded.pp) != (tp, pp):
                raise InputError(
                    f"{self.folder}: {FILE} says {recorded}, the folders show TP{tp} PP{pp}; files are missing"
                )
            return recorded
        keys = sorted((key for key in self.first if MODEL_KEY.match(key)), key=len)
        counts = [[layer_count(self.files[0, rank].get(key, {})) for rank in range(pp)] for key in keys]
        return Layout(tp, pp, tuple(tuple(row) for row in counts))

    def collect(self, section: tuple[str, ...]) -> dict[str, list[LazyTensor]]:
        """The ranks' shares of every tensor of a section, by logical name."""
        found: dict[str, list[LazyTensor]] = {}
        for vp_rank, key in enumerate(self.layout.model_keys()):
            for pp_rank in range(self.layout.pp):
                shares = [
                    self.local_tensors(section, key, tp_rank, pp_rank, self.layout.layers(pp_rank, vp_rank).start)
                    for tp_rank in range(self.layout.tp)
                ]
                for rank, share in enumerate(shares):
                    differing = set(share) ^ set(shares[0])
                    if differing:
                        raise InputError(
                            f"{self.folder}: tensor ranks 0 and {rank} of stage {pp_rank} hold different tensors:"
                            f" {sorted(differing)[:3]}"
                        )
                for name in shares[0]:
                    # The copy of a tied embedding on the last stage is the embedding's by definition.
                    if name != OUTPUT_LAYER or not self.config.tie_word_embeddings:
                        found[name] = [share[name] for share in shares]
        order = {name: number for number, name in enumerate(self.table.entries)}
        return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))

    def local_tensors(
        self, section: tuple[str, ...], key: str, tp_rank: int, pp_rank: int, first_layer: int
    ) -> dict[str, LazyTensor]:
        """Tensors of one chunk in one file, by logical name; `_extra_state` and other non-tensors are not weights."""
        where = self.folder / self.layout.rank_folder(tp_rank, pp_rank) / CHECKPOINT_FILE
        state: Any = self.files[tp_rank, pp_rank]
        for step in (*section, key):
            if not isinstance(state, dict) or step not in state:
                raise InputError(f"{where}: has no {'/'.join((*section, key))}")
            state = state[step]
        return {logical_name(k, first_layer): v for k, v in state.items() if isinstance(v, LazyTensor)}

    def check_shapes(self, tensors: Mapping[str, list[LazyTensor]]) -> None:
        """Every share has the shape its settings give it."""
        for name, shares in tensors.items():
            if name in self.table.entries:
                shape, padded = self.table.shape(name), self.padded_rows
                if self.table.entry(name).kind is Kind.VOCAB and padded is not None and padded < shape[0]:
                    raise InputError(f"{self.folder}: {name} has {padded} rows, its settings say {shape[0]}")
            elif is_lora(name):
                match = LORA_NAME.match(name)
                shape = self.table.shape(name, shares[0].shape[0 if match["factor"] == "lora_A" else 1])
                padded = None
            else:
                raise InputError(f"{self.folder}: {name} is unknown to a {self.config.family} model of {self.layout}")
            axis = self.table.shard_map(name, self.layout.tp, padded)
            for rank, share in enumerate(shares):
                wanted = list(shape)
                if axis.dim is not None:
                    wanted[axis.dim] = axis.part_size(rank)
                if list(share.shape) != wanted:
                    raise InputError(
                        f"{share.path}: {name} has shape {list(share.shape)}, {self.layout} asks for {wanted}"
                    )

    @property
    def lora_names(self) -> list[str]:
        """Logical names of the LoRA factors in this checkpoint."""
        return [name for name in self.tensors if is_lora(name)]

    @cached_property
    def missing_base(self) -> list[str]:
        """Base tensors of the table that this checkpoint does not hold."""
        return [name for name in self.table.entries if name not in self.tensors]

    def base(self) -> ShardedSource:
        """The base weights; `InputError` when some are missing."""
        if self.missing_base:
            kind = "a LoRA adapter without its base" if self.lora_names else "an incomplete model"
            raise InputError(
                f"{self.folder}: {kind}: {len(self.missing_base)} tensors are missing, first {self.missing_base[0]};"
                " give the base model's folder instead"
            )
        return ShardedSource(self, {name: self.tensors[name] for name in self.table.entries}, self.padded_rows)

    def lora(self) -> ShardedSource:
        """The LoRA factors; `InputError` when there are none."""
        if not self.lora_names:
            raise InputError(f"{self.folder}: holds no LoRA weights; give the folder that LoRA training saved")
        return ShardedSource(self, {name: self.tensors[name] for name in self.lora_names}, None)

    def section(self, *path: str) -> ShardedSource:
        """Other tensors kept per parameter, by the parameter's logical name, at any layout.

        `section("optimizer", "exp_avg")` reads `file["optimizer"]["exp_avg"][model key][local parameter name]`.
        """
        tensors = self.collect(path)
        self.check_shapes(tensors)
        return ShardedSource(self, tensors, self.padded_rows)


def read_ranks(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """The files of an iteration folder by (tensor rank, pipeline rank); `InputError` when one is missing."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = RANK_FOLDER.match(path.name)
        if not match:
            raise InputError(f"{path}: not a rank folder's name (mp_rank_TT or mp_rank_TT_PPP)")
        if match[3]:
            raise InputError(f"{path}: expert-parallel checkpoints are not supported yet")
        found[int(match[1]), int(match[2] or 0)] = path / CHECKPOINT_FILE
    if not found:
        raise InputError(f"{folder}: no mp_rank_* folders in it")
    sizes = [max(rank[axis] for rank in found) + 1 for axis in (0, 1)]
    lost = [f"{tp:02d}_{pp:03d}" for pp in range(sizes[1]) for tp in range(sizes[0]) if (tp, pp) not in found]
    if lost:
        raise InputError(f"{folder}: rank folders are missing for TP{sizes[0]} PP{sizes[1]}: mp_rank_{', '.join(lost)}")
    files = {}
    for rank, path in found.items():
        files[rank] = read_torch_file(path)
        if not isinstance(files[rank], dict) or not any(MODEL_KEY.match(str(key)) for key in files[rank]):
            raise InputError(f"{path}: not a checkpoint: it has no model")
    return files


def layer_count(state: Mapping[str, Any]) -> int:
    """Layers of one chunk: one more than the highest local number."""
    numbers = [int(match[0]) for key in state if (match := LAYER_NUMBER.search(WRAPPERS.sub("", key)))]
    return max(numbers, default=-1) + 1
