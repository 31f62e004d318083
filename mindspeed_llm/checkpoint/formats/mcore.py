"""Megatron checkpoints of per-rank `torch` files, read as logical tensors whatever their layout.

    <run>/latest_checkpointed_iteration.txt      "20" or "release"
    <run>/iter_0000020/args.json                 ours only
    <run>/iter_0000020/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt

Written by upstream's converters, by training, or by us. The layout is found from folder names, keys and `args`, and
held against the tensors' shapes.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mindspeed_llm.checkpoint.atomic import TRACKER, iteration_folder
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, assemble
from mindspeed_llm.checkpoint.formats.mcore_names import FileNames, local_shape, lora_rank
from mindspeed_llm.checkpoint.formats.torch_file import read_torch_file
from mindspeed_llm.checkpoint.kinds import AxisMap, Ranges, whole_copies
from mindspeed_llm.checkpoint.layout import CHECKPOINT_FILE, RANK_FOLDER, Layout, Rank, Slots, deal
from mindspeed_llm.checkpoint.metadata import Metadata, read_metadata
from mindspeed_llm.checkpoint.tables import (
    EMBEDDING,
    LAYER_NUMBER,
    LORA_NAME,
    OUTPUT_LAYER,
    WRAPPERS,
    WeightTable,
    is_lora,
)
from mindspeed_llm.checkpoint.upstream_args import check_recorded, config_from_args
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families.base import Kind

ITERATION_NUMBER = re.compile(r"^[0-9]{1,18}$")
MODEL_KEY = re.compile(r"^model\d*$")


def is_megatron(folder: str | Path) -> bool:
    """Whether a folder looks like a Megatron checkpoint: a tracker, rank folders, or torch_dist's files."""
    folder = Path(folder)
    return os.path.lexists(folder / TRACKER) or holds_checkpoint(folder) or bool(iterations(folder))


def holds_checkpoint(folder: Path) -> bool:
    """Whether a folder itself is an iteration folder."""
    return any(folder.glob("mp_rank_*")) or (folder / "metadata.json").is_file()


def iterations(folder: Path) -> list[Path]:
    """The iteration folders of a run folder, the newest last."""
    found = [path for path in folder.glob("iter_*") if ITERATION_NUMBER.match(path.name[5:]) and holds_checkpoint(path)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def resolve(folder: str | Path) -> Path:
    """The iteration folder of a run folder, or the folder itself when it is one.

    A run folder's tracker names it; without a tracker it is the newest.

    Raises:
        InputError: neither, or the tracker points to nothing.
    """
    folder = Path(folder)
    tracker = folder / TRACKER
    if os.path.lexists(tracker):
        try:
            text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise InputError(f"{tracker}: cannot be read ({error.strerror}); write it anew") from error
        if text != "release" and not ITERATION_NUMBER.match(text):
            raise InputError(f"{tracker}: says {text!r:.40}, expected an iteration number or release")
        found = folder / ("release" if text == "release" else iteration_folder(int(text)))
        if not found.is_dir():
            raise InputError(f"{tracker}: says {text}, but {found} does not exist; correct the tracker")
        return found
    if holds_checkpoint(folder):
        return folder
    if found := iterations(folder):
        return found[-1]
    there = "" if folder.is_dir() else " (no such folder)"
    raise InputError(f"{folder}{there}: no Megatron checkpoint: neither {TRACKER} nor mp_rank_* folders")


class Stored(NamedTuple):
    """One logical tensor in rank files: how the ranks share it, and each rank's share."""

    axis: AxisMap
    parts: list[LazyTensor]


class ShardedSource:
    """Tensors that lie in rank files, by logical name (`TensorSource`)."""

    def __init__(self, checkpoint: "MegatronCheckpoint", tensors: Mapping[str, Stored]) -> None:
        """Show `tensors` of an opened checkpoint."""
        self.path = checkpoint.folder
        self.metadata = checkpoint.metadata
        self.config = checkpoint.config
        self.table = checkpoint.table
        self.tensors = tensors

    def names(self) -> list[str]:
        """Logical names."""
        return list(self.tensors)

    def stored(self, name: str) -> Stored:
        """The ranks' shares of a tensor; `InputError` when the checkpoint has none."""
        name = self.table.resolve(name)
        if name not in self.tensors:
            raise InputError(f"{self.path}: no tensor {name}")
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        if not is_lora(name):
            return self.table.shape(name)
        return self.table.shape(name, lora_rank(name, self.stored(name).parts[0].shape))

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values in the files."""
        return self.stored(name).parts[0].dtype

    def read(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The logical tensor, or a box of it, joined from the ranks' shares."""
        axis, parts = self.stored(name)
        return assemble(parts, axis, rows, columns)


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
        self.first = self.files[min(self.files)]
        self.args = vars(self.first["args"]) if isinstance(self.first.get("args"), argparse.Namespace) else {}
        if self.metadata:
            check_recorded(self.first.get("args"), self.metadata.model, str(self.folder))
            self.config: ModelConfig = self.metadata.model
        else:
            self.config = self.with_predictions(config or self.config_of_args(family_name))
        self.layout = self.find_layout()
        self.table = WeightTable(self.config)
        if self.config.num_layers != self.layout.num_layers:
            raise InputError(
                f"{self.folder}: the files hold {self.layout.num_layers} layers, its settings say"
                f" {self.config.num_layers}; a file is missing or from another model"
            )
        self.tensors = self.collect(())

    def config_of_args(self, family_name: str | None) -> ModelConfig:
        """The model as the file's own args describe it."""
        for _, state in self.states(self.first):
            dtype = next((value.dtype for value in state.values() if isinstance(value, LazyTensor)), None)
            if dtype is not None:
                return config_from_args(self.first.get("args"), str(self.folder), dtype, family_name)
        raise InputError(f"{self.folder}: its files hold no tensors")

    def with_predictions(self, config: ModelConfig) -> ModelConfig:
        """`config` with as many prediction layers as the files hold."""
        numbers = [
            int(match[1])
            for file in self.files.values()
            for _, state in self.states(file)
            for key in state
            if (match := re.match(r"mtp\.layers\.(\d+)\.", WRAPPERS.sub("", key)))
        ]
        return dataclasses.replace(config, mtp_num_layers=max(numbers, default=-1) + 1)

    @staticmethod
    def states(file: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(key, state dict) of a rank file's chunks, by virtual stage."""
        for key in sorted((key for key in file if MODEL_KEY.match(str(key))), key=lambda key: (len(key), key)):
            if isinstance(file[key], Mapping):
                yield key, file[key]

    def find_layout(self) -> Layout:
        """The layout recorded in args.json, or that of the pickled args, held against the files."""
        tp, pp, ep = (max(rank[axis] for rank in self.files) + 1 for axis in range(3))
        if self.metadata:
            layout = self.metadata.layout
        else:
            layout = self.layout_of_files(tp, pp, ep)
        for key, found in (
            ("tensor_model_parallel_size", tp),
            ("pipeline_model_parallel_size", pp),
            ("expert_model_parallel_size", ep),
        ):
            if (self.args.get(key) or found) != found:
                raise InputError(
                    f"{self.folder}: args say {key} {self.args[key]}, the folders show {found}; files are missing"
                )
        expected = set(layout.ranks())
        if (layout.tp, layout.pp, layout.ep) != (tp, pp, ep) or expected != set(self.files):
            lost = ", ".join(layout.rank_folder(*rank) for rank in sorted(expected - set(self.files))[:3])
            raise InputError(f"{self.folder}: holds no files of {layout}: missing {lost or 'none'}, or too many")
        return layout

    def layout_of_files(self, tp: int, pp: int, ep: int) -> Layout:
        """The layout the folders, keys and pickled args show."""
        v_shaped = self.args.get("schedules_method") == "dualpipev"
        extends = bool(self.args.get("moe_tp_extend_ep"))
        keys = [key for key, _ in self.states(self.first)]
        widths = [[local_layers(self.files, pp_rank, key) for pp_rank in range(pp)] for key in keys]
        flat = iter(range(self.config.num_layers))
        shown: dict[tuple[int, int], Slots] = {}
        for vp_rank, pp_rank in Layout(tp, pp, deal([], [[0] * pp] * len(keys), v_shaped), v_shaped=v_shaped).order():
            held = widths[vp_rank][pp_rank]
            slots = range(max(held, default=-1) + 1)
            shown[vp_rank, pp_rank] = tuple(next(flat, None) if slot in held else None for slot in slots)
        longest = max(len(slots) for slots in shown.values())
        if self.args.get("noop_layers"):  # a no-op layer at a chunk's end leaves no key behind
            shown = {place: slots + (None,) * (longest - len(slots)) for place, slots in shown.items()}
        chunks = tuple(tuple(shown[vp, rank] for rank in range(pp)) for vp in range(len(keys)))
        etp = 1 if extends else self.args.get("expert_tensor_parallel_size") or tp
        pairs = {(rank.tp, rank.ep) for rank in self.files}
        if not extends and len(pairs) < tp * ep:
            etp = 1
        return Layout(tp, pp, chunks, ep, etp, extends, v_shaped)

    def collect(self, section: tuple[str, ...]) -> dict[str, Stored]:
        """The ranks' shares of every tensor of a section, by logical name."""
        found: dict[str, dict[int, LazyTensor]] = {}
        whole: set[str] = set()
        for rank in self.layout.ranks():
            for vp_rank, key in enumerate(self.layout.model_keys()):
                names = FileNames(self.table, self.layout, rank, vp_rank)
                for name, tensor, is_whole in self.local_tensors(section, key, rank, names):
                    entry = self.table.entries.get(LORA_NAME.sub(r"\g<module>.weight", name))
                    of_expert = entry is not None and entry.expert is not None
                    parts = found.setdefault(name, {})
                    parts.setdefault(names.experts.part if of_expert else rank.tp, tensor)
                    if is_whole:
                        whole.add(name)
        if self.config.tie_word_embeddings:
            # The copy of a tied embedding on the last stage is the embedding's by definition.
            found.pop(OUTPUT_LAYER, None)
        order = {name: number for number, name in enumerate(self.table.entries)}
        names_in_order = sorted(found, key=lambda name: order.get(name, len(order)))
        return {name: self.checked(name, found[name], name in whole) for name in names_in_order}

    def local_tensors(
        self, section: tuple[str, ...], key: str, rank: Rank, names: FileNames
    ) -> Iterator[tuple[str, LazyTensor, bool]]:
        """What one chunk of one file holds, by logical name; `_extra_state` and other non-tensors are not weights."""
        where = self.folder / self.layout.rank_folder(*rank) / CHECKPOINT_FILE
        state: Any = self.files[rank]
        for step in (*section, key):
            if not isinstance(state, Mapping) or step not in state:
                raise InputError(f"{where}: has no {'/'.join((*section, key))}")
            state = state[step]
        for file_key, tensor in state.items():
            if not isinstance(tensor, LazyTensor) or file_key.endswith("_extra_state"):
                continue
            try:
                yield from names.logical(file_key, tensor)
            except KeyError as error:
                raise InputError(f"{where}: {file_key} is beyond the {len(names.slots)} layers of its stage") from error

    def checked(self, name: str, parts: dict[int, LazyTensor], whole: bool) -> Stored:
        """A tensor's shares, each of the shape its settings give it."""
        if name in self.table.entries:
            entry, shape = self.table.entries[name], self.table.shape(name)
        elif is_lora(name):
            entry = self.table.entry(LORA_NAME.match(name)["module"] + ".weight")
            shape = self.table.shape(name, lora_rank(name, next(iter(parts.values())).shape))
        else:
            raise InputError(f"{self.folder}: {name} is unknown to a {self.config.family} model of {self.layout}")
        count = self.layout.tp if entry.expert is None else self.layout.etp
        lost = sorted(set(range(count)) - set(parts))
        if lost:
            raise InputError(f"{self.folder}: tensor ranks hold different tensors: {name} is not on rank {lost[0]}")
        padded = None
        if entry.kind is Kind.VOCAB and not is_lora(name):
            padded = parts[0].shape[0] * count
            if padded < shape[0]:
                raise InputError(f"{self.folder}: {name} has {padded} rows, its settings say {shape[0]}")
        axis = whole_copies(count) if whole else self.table.shard_map(name, count, padded)
        for rank in range(count):
            wanted = local_shape(shape, axis, rank)
            if parts[rank].shape != wanted:
                raise InputError(
                    f"{parts[rank].path}: {name} has shape {list(parts[rank].shape)}, {self.layout} asks for"
                    f" {list(wanted)}"
                )
        return Stored(axis, [parts[rank] for rank in range(count)])

    @property
    def padded_rows(self) -> int | None:
        """Rows of the embedding over all ranks; None when it is not in this checkpoint."""
        stored = self.tensors.get(EMBEDDING)
        return None if stored is None else stored.parts[0].shape[0] * self.layout.tp

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
        return ShardedSource(self, {name: self.tensors[name] for name in self.table.entries})

    def lora(self) -> ShardedSource:
        """The LoRA factors; `InputError` when there are none."""
        if not self.lora_names:
            raise InputError(f"{self.folder}: holds no LoRA weights; give the folder that LoRA training saved")
        return ShardedSource(self, {name: self.tensors[name] for name in self.lora_names})

    def section(self, *path: str) -> ShardedSource:
        """Other tensors kept per parameter, by the parameter's logical name, at any layout.

        `section("optimizer", "exp_avg")` reads `file["optimizer"]["exp_avg"][model key][local parameter name]`.
        """
        return ShardedSource(self, self.collect(path))


def read_ranks(folder: Path) -> dict[Rank, dict[str, Any]]:
    """The files of an iteration folder by rank; `InputError` when one is missing."""
    found: dict[Rank, Path] = {}
    matches: list[tuple[re.Match[str], Path]] = []
    for path in sorted(folder.glob("mp_rank_*")):
        match = RANK_FOLDER.match(path.name)
        if not match:
            raise InputError(f"{path}: not a rank folder's name (mp_rank_TT, mp_rank_TT_PPP or mp_rank_TT_PPP_EEE)")
        matches.append((match, path))
    if not matches:
        raise InputError(f"{folder}: no mp_rank_* folders in it")
    shapes = {tuple(group is not None for group in match.groups()) for match, _ in matches}
    if len(shapes) > 1:
        raise InputError(f"{folder}: rank folders of different layouts lie in it; remove those of an earlier run")
    for match, path in matches:
        found[Rank(int(match[1]), int(match[2] or 0), int(match[3] or 0))] = path / CHECKPOINT_FILE
    files: dict[Rank, dict[str, Any]] = {}
    for rank, path in found.items():
        files[rank] = read_torch_file(path)
        if not isinstance(files[rank], dict) or not any(MODEL_KEY.match(str(key)) for key in files[rank]):
            raise InputError(f"{path}: not a checkpoint: it has no model")
    if shapes == {(True, True, False)}:
        files = as_expert_ranks(files)
    sizes = [max(rank[axis] for rank in files) + 1 for axis in (0, 1)]
    lost = [
        f"{tp:02d}_{pp:03d}"
        for pp in range(sizes[1])
        for tp in range(sizes[0])
        if not any(rank[:2] == (tp, pp) for rank in files)
    ]
    if lost:
        raise InputError(f"{folder}: rank folders are missing for TP{sizes[0]} PP{sizes[1]}: mp_rank_{', '.join(lost)}")
    return files


def as_expert_ranks(files: dict[Rank, dict[str, Any]]) -> dict[Rank, dict[str, Any]]:
    """Files whose one extra number is the expert's, not the stage's: their args say so."""
    args = next(iter(files.values())).get("args")
    if (
        getattr(args, "pipeline_model_parallel_size", 1) == 1
        and (getattr(args, "expert_model_parallel_size", 1) or 1) > 1
    ):
        return {Rank(rank.tp, 0, rank.pp): file for rank, file in files.items()}
    return files


def local_layers(files: Mapping[Rank, Mapping[str, Any]], pp_rank: int, key: str) -> set[int]:
    """The local numbers of the layers that a stage's chunk holds."""
    state = next(file for rank, file in files.items() if rank.pp == pp_rank).get(key) or {}
    names = (WRAPPERS.sub("", name) for name in state)
    return {int(match[0]) for name in names if (match := LAYER_NUMBER.search(name))}
