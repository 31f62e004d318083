"""A training checkpoint as `torch_dist`, written by many ranks at once: each its own shares, whatever its layout.

    <iteration>/__R_N.distcp           tensors of rank R: weights, and fp32_param, exp_avg, exp_avg_sq of trained ones
    <iteration>/.shares_R.json         which box of which key lies where; merged into .metadata by `merge_shares`
    <iteration>/rng_TT_PPP_EEE.pt      random states of the data-parallel ranks of one place
    <iteration>/common.pt              progress, the optimizer's step and groups

Keys are megatron-core's (`torch_dist_names`), `optimizer.state.<field>.<key>` for optimizer state. LoRA factors, for
which megatron-core has no names, lie under their logical ones.
"""

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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

from mindspeed_llm.checkpoint.formats.blocks import write_values
from mindspeed_llm.checkpoint.formats.mcore_names import lora_rank
from mindspeed_llm.checkpoint.formats.torch_dist_file import METADATA
from mindspeed_llm.checkpoint.formats.torch_dist_names import Form, extra_state_keys, form_of, other_names, spell
from mindspeed_llm.checkpoint.formats.torch_dist_writer import (
    FILE_BYTES,
    VERSION,
    ShardFiles,
    saved,
    write_durably,
    write_settings,
)
from mindspeed_llm.checkpoint.layout import ExpertShare, Rank
from mindspeed_llm.checkpoint.tables import EMBEDDING, OUTPUT_LAYER, WeightTable, expert_number, is_lora, logical_name

STATE_PREFIX = "optimizer.state."
STATE_KEYS = {"master": "fp32_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Fields of the optimizer's state, by the name that megatron-core's files give them."""
MASTER_KEYS = ("fp32_param", "param")
"""Names of master weights in files of megatron-core's plain and of its distributed optimizer; one place has both."""
SHARDING = "distrib_optim_sharding_type"
OPTIMIZER_FORM = {SHARDING: "fully_reshardable", "chained_optim_avoid_prefix": True}
"""What megatron-core has to know to ask for optimizer state by these names, at any layout."""
STEP = "optimizer_step"
"""Where common.pt has the optimizer's step for our own reader."""
SHARES = ".shares_{}.json"
EXTRA_RANK = 999_999
"""Number, beyond any rank's, of the file with the empty `_extra_state` that megatron-core's modules ask for."""


class Owner(NamedTuple):
    """Which shares of a model one rank holds.

    Attributes:
        first_layers: global number of layer 0 of each of its chunks, by the chunk's key ("model", "model0", ...).
        rank, size: of tensor parallelism. experts: its experts.
    """

    first_layers: Mapping[str, int]
    rank: int
    size: int
    experts: ExpertShare


@dataclass(frozen=True)
class Box:
    """One box of one stored tensor.

    Attributes:
        key: of the stored tensor. shape: of the whole stored tensor. offsets: of the box in it.
        values: of the box, without the leading axes of layers and experts.
    """

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: torch.Tensor


def rng_file(place: Rank) -> str:
    """Name of the file with the random states of one place."""
    return f"rng_{place.tp:02d}_{place.pp:03d}_{place.ep:03d}.pt"


def boxes(
    table: WeightTable, form: Form, owner: Owner, name: str, value: torch.Tensor
) -> Iterator[tuple[tuple[str, ...], Box]]:
    """(every key it goes by, box) of one rank's share of a logical tensor; nothing where another rank writes it."""
    of_expert = expert_number(name) is not None
    part, parts = (owner.experts.part, owner.experts.parts) if of_expert else (owner.rank, owner.size)
    padded = value.shape[0] * parts if name in (EMBEDDING, OUTPUT_LAYER) else None
    axis = table.shard_map(name, parts, padded)
    if is_lora(name):
        shape = table.shape(name, lora_rank(name, value.shape))
        keys, axes, place = (name,), (), ()
    else:
        entry = table.entry(name)
        shape, found = entry.shape, spell(entry, form)
        keys = (found.keys[0], *(spell(entry, form, other).keys[0] for other in other_names(name)))
        axes, place = found.axes, found.place
    whole = (*axes, *shape)
    if axis.dim is None:
        if part == 0:
            yield keys, Box(keys[0], whole, place + (0,) * len(shape), value)
        return
    logical = 0
    for segment in axis.segments:
        if segment.part == part:
            offsets = [0] * len(shape)
            offsets[axis.dim] = logical
            yield keys, Box(keys[0], whole, (*place, *offsets), value.narrow(axis.dim, segment.start, segment.length))
        logical += segment.length


def sections(content: Mapping[str, Any], owner: Owner) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(prefix of its keys, logical name, share) of every tensor of a rank file's content (`rank_content`)."""
    optimizer = content.get("optimizer") or {}
    for key, first_layer in owner.first_layers.items():
        states = [("", content[key])]
        states += [(f"{STATE_PREFIX}{STATE_KEYS[field]}.", optimizer[field][key]) for field in STATE_KEYS if optimizer]
        for prefix, state in states:
            for local, value in state.items():
                if isinstance(value, torch.Tensor):
                    yield prefix, logical_name(local, first_layer, first_expert=owner.experts.first), value


def prefixes(prefix: str) -> list[str]:
    """All prefixes that go with the first one of a section."""
    own, other = (f"{STATE_PREFIX}{key}." for key in MASTER_KEYS)
    return [prefix, other] if prefix == own else [prefix]


def write_shares(
    folder: Path, rank: int, place: Rank, content: Mapping[str, Any], table: WeightTable, owner: Owner
) -> None:
    """Write one rank's shares, and what `merge_shares` has to know about them.

    Args:
        rank: of the process; no two have the same.
        place: of its random states.
        content: as `training.checkpointing.rank_content` gives it.
    """
    form, listed = form_of(table), []
    with ShardFiles(folder, FILE_BYTES, rank=rank) as files:
        for prefix, name, value in sections(content, owner):
            if table.resolve(name) != name:  # a tied output layer is the embedding
                continue
            for keys, box in boxes(table, form, owner, name, value):
                sizes = (1,) * (len(box.shape) - box.values.dim()) + tuple(box.values.shape)
                info, where = files.add_tensor(box.values.dtype, sizes, tuple(box.values.shape))
                write_values(where.descriptor, where.offset, box.values)
                dtype = str(box.values.dtype).removeprefix("torch.")
                place_in = (info.relative_path, info.offset, info.length)
                for key in (name_of + key for name_of in prefixes(prefix) for key in keys):
                    listed.append((key, dtype, box.shape, box.offsets, sizes, *place_in))
    write_durably(folder / SHARES.format(rank), json.dumps(listed).encode())
    if content.get("rng_state"):
        with (folder / rng_file(place)).open("wb") as file:
            torch.save(content["rng_state"], file)
            file.flush()
            os.fsync(file.fileno())


def merge_shares(folder: Path, table: WeightTable, common: Mapping[str, Any]) -> None:
    """Make a checkpoint of what all ranks have written; its metadata.json comes last.

    Where two ranks have written the same box, that of the lower rank counts.

    Args:
        common: what common.pt holds besides the form of its names.
    """
    index = Index({}, None, {}, StorageMeta(), VERSION)
    parts = sorted(folder.glob(SHARES.format("*")), key=lambda path: int(path.stem.rpartition("_")[2]))
    for part in parts:
        for key, dtype, shape, offsets, sizes, file, start, length in json.loads(part.read_bytes()):
            about = index.state_dict_metadata.get(key)
            if about is None:
                about = TensorStorageMetadata(TensorProperties(getattr(torch, dtype)), torch.Size(shape), [])
                index.state_dict_metadata[key] = about
            place = torch.Size(offsets)
            if any(chunk.offsets == place for chunk in about.chunks):
                continue
            about.chunks.append(ChunkStorageMetadata(place, torch.Size(sizes)))
            number = len(about.chunks) - 1
            index.storage_data[MetadataIndex(key, place, number)] = _StorageInfo(file, start, length)
    form = form_of(table)
    if EMBEDDING in index.state_dict_metadata:
        with ShardFiles(folder, FILE_BYTES, rank=EXTRA_RANK) as files:
            empty = files.add_bytes(saved([None]))
        for key in (key for entry in table.entries.values() for key in extra_state_keys(entry, form)):
            index.state_dict_metadata[key] = BytesStorageMetadata()
            index.storage_data[MetadataIndex(key)] = empty
    for part in parts:
        part.unlink()
    write_durably(folder / METADATA, pickle.dumps(index))
    write_settings(folder, form, common, OPTIMIZER_FORM if STEP in common else {})
