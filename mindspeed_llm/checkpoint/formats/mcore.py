"""Megatron checkpoints of per-rank `torch` files, read as logical tensors whatever their layout.

    <run>/latest_checkpointed_iteration.txt      "20" or "release"
    <run>/iter_0000020/args.json                 ours only
    <run>/iter_0000020/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt

Written by upstream's converters, by training, or by us. The layout is found from folder names, keys and `args`, and
held against the tensors' shapes.
"""

import argparse
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mindspeed_llm.checkpoint.formats.contents import Contents
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, assemble, listed
from mindspeed_llm.checkpoint.formats.mcore_names import FileNames, local_shape, lora_rank
from mindspeed_llm.checkpoint.formats.run_folder import MODEL_KEY, read_ranks, resolve
from mindspeed_llm.checkpoint.kinds import AxisMap, Ranges, whole_copies
from mindspeed_llm.checkpoint.layout import CHECKPOINT_FILE, Layout, Rank, Slots, deal
from mindspeed_llm.checkpoint.metadata import LoraSettings, Metadata, read_metadata
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
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families.base import Kind

TRAINING_STATE = ("optimizer", "opt_param_scheduler")
"""Keys of a rank file that hold no weights."""


class Stored(NamedTuple):
    """One logical tensor in rank files: how the ranks share it, and each rank's share."""

    axis: AxisMap
    parts: list[LazyTensor]


class ShardedSource:
    """Tensors that lie in rank files, by logical name (`TensorSource`).

    Attributes:
        known_hash: the content hash, once somebody asked for it (`open.source_hash`).
    """

    known_hash: str | None = None

    def __init__(self, checkpoint: "MegatronCheckpoint", tensors: Mapping[str, Stored]) -> None:
        """Show `tensors` of an opened checkpoint."""
        self.path = checkpoint.folder
        self.notes = checkpoint.notes
        self.layout = checkpoint.layout
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


class MegatronCheckpoint(Contents):
    """One iteration folder, opened: headers are read, tensors are not."""

    def __init__(
        self,
        path: str | Path,
        family_name: str | None = None,
        config: ModelConfig | None = None,
        ignore_unknown: bool = False,
    ) -> None:
        """Open a run or iteration folder.

        Args:
            family_name: `--model-type-hf`, for checkpoints that do not say their family.
            config: the model, if known from an HF folder; it replaces the pickled args, not an args.json.
            ignore_unknown: tensors the weight table does not know are left out, and a note says so.

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
        self.notes: list[str] = []
        self.tensors = self.collect((), ignore_unknown)
        if any(key in self.first for key in TRAINING_STATE) or any(self.folder.glob("*/distrib_optim.pt")):
            self.notes.append(f"{self.folder}: optimizer state and schedules are left out; weights only")
        if EMBEDDING in self.tensors:  # what the weights are wins over what the settings say they are
            stored = str(self.tensors[EMBEDDING].parts[0].dtype).removeprefix("torch.")
            self.config = dataclasses.replace(self.config, dtype=stored)
            self.table = WeightTable(self.config)

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
            wrong = f"missing {lost}" if lost else f"its {len(self.files)} files are too many"
            raise InputError(f"{self.folder}: does not hold the files of {layout}: {wrong}")
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

    def collect(self, section: tuple[str, ...], ignore_unknown: bool = False) -> dict[str, Stored]:
        """The ranks' shares of every tensor of a section, by logical name."""
        found: dict[str, dict[int, LazyTensor]] = {}
        whole: set[str] = set()
        for rank in self.layout.ranks():
            for vp_rank, key in enumerate(self.layout.model_keys()):
                names = FileNames(self.table, self.layout, rank, vp_rank)
                seen: set[str] = set()
                for name, tensor, is_whole in self.local_tensors(section, key, rank, names):
                    if name in seen:
                        raise InputError(f"{tensor.path}: {name} is stored twice, under two names; remove one")
                    seen.add(name)
                    entry = self.table.entries.get(LORA_NAME.sub(r"\g<module>.weight", name))
                    of_expert = entry is not None and entry.expert is not None
                    parts = found.setdefault(name, {})
                    parts.setdefault(names.experts.part if of_expert else rank.tp, tensor)
                    if is_whole:
                        whole.add(name)
        if self.config.tie_word_embeddings:
            # The copy of a tied embedding on the last stage is the embedding's by definition.
            found.pop(OUTPUT_LAYER, None)
        self.drop_unknown(found, ignore_unknown)
        order = {name: number for number, name in enumerate(self.table.entries)}
        names_in_order = sorted(found, key=lambda name: order.get(name, len(order)))
        try:
            return {name: self.checked(name, found[name], name in whole) for name in names_in_order}
        except UsageError as error:
            raise InputError(f"{self.folder}: its files do not fit its settings: {error}") from error

    def drop_unknown(self, found: dict[str, Any], ignore_unknown: bool) -> None:
        """Take the tensors that are neither in the weight table nor LoRA factors out; `InputError` if not asked to."""
        strange = [name for name in found if name not in self.table.entries and not self.is_factor(name)]
        if strange and not ignore_unknown:
            raise InputError(
                f"{self.folder}: {len(strange)} tensors are unknown to a {self.config.family} model {listed(strange)};"
                " --ignore-unknown leaves them out"
            )
        if strange:
            self.notes.append(f"{self.folder}: {len(strange)} unknown tensors are left out: {listed(strange)}")
        for name in strange:
            del found[name]

    def is_factor(self, name: str) -> bool:
        """Whether this is a LoRA factor of a weight of the table."""
        match = LORA_NAME.match(name)
        return match is not None and match["module"] + ".weight" in self.table.entries

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
        if not isinstance(state, Mapping) or not all(isinstance(file_key, str) for file_key in state):
            raise InputError(f"{where}: {'/'.join((*section, key))} is no dictionary of tensors; the file is damaged")
        for file_key, tensor in state.items():
            if not isinstance(tensor, LazyTensor) or file_key.endswith("_extra_state"):
                continue
            try:
                yield from names.logical(file_key, tensor)
            except KeyError as error:
                raise InputError(f"{where}: {file_key} is beyond the {len(names.slots)} layers of its stage") from error

    def checked(self, name: str, parts: dict[int, LazyTensor], whole: bool) -> Stored:
        """A tensor's shares, all of one type and each of the shape its settings give it."""
        if name in self.table.entries:
            entry, shape = self.table.entries[name], self.table.shape(name)
        else:
            entry = self.table.entry(LORA_NAME.match(name)["module"] + ".weight")
            shape = self.table.shape(name, lora_rank(name, next(iter(parts.values())).shape))
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
            found, first = parts[rank].dtype, parts[0].dtype
            if found != first or not found.is_floating_point or found.itemsize < 2:
                raise InputError(
                    f"{parts[rank].path}: {name} is {found}, expected"
                    f" {f'{first} as on rank 0' if found != first else 'bfloat16, float16 or float32'}"
                )
        return Stored(axis, [parts[rank] for rank in range(count)])

    @property
    def padded_rows(self) -> int | None:
        """Rows of the embedding over all ranks; None when it is not in this checkpoint."""
        stored = self.tensors.get(EMBEDDING)
        return None if stored is None else stored.parts[0].shape[0] * self.layout.tp

    def base(self) -> ShardedSource:
        """The base weights; `InputError` when some are missing."""
        return ShardedSource(self, {name: self.tensors[name] for name in self.base_names()})

    def lora(self, settings: LoraSettings | None = None) -> ShardedSource:
        """The LoRA factors, and what is trained whole by `settings`; `InputError` when there are no factors."""
        return ShardedSource(self, {name: self.tensors[name] for name in self.adapter_names(settings)})

    def section(self, *path: str) -> ShardedSource:
        """Other tensors kept per parameter, by the parameter's logical name, at any layout.

        `section("optimizer", "exp_avg")` reads `file["optimizer"]["exp_avg"][model key][local parameter name]`.
        """
        return ShardedSource(self, self.collect(path))

    def rng_states(self, place: Rank) -> list[Any] | None:
        """The random states of the data-parallel ranks of one place; None where none were saved."""
        return self.files[place].get("rng_state")


def local_layers(files: Mapping[Rank, Mapping[str, Any]], pp_rank: int, key: str) -> set[int]:
    """The local numbers of the layers that a stage's chunk holds."""
    state = next(file for rank, file in files.items() if rank.pp == pp_rank).get(key) or {}
    names = (WRAPPERS.sub("", name) for name in state)
    return {int(match[0]) for name in names if (match := LAYER_NUMBER.search(name))}
