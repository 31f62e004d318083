"""Writing a model as per-rank Megatron `torch` files, in any layout, one tensor in memory at a time."""

import functools
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mindspeed_llm.checkpoint.formats.lazy import TensorSource, part_of
from mindspeed_llm.checkpoint.formats.torch_file import fill, write_skeleton
from mindspeed_llm.checkpoint.kinds import AxisMap, padded_vocabulary
from mindspeed_llm.checkpoint.layout import CHECKPOINT_FILE, Layout
from mindspeed_llm.checkpoint.tables import EMBEDDING, LAYER_NUMBER, OUTPUT_LAYER, WeightTable, file_key
from mindspeed_llm.checkpoint.upstream_args import upstream_args
from mindspeed_llm.models.families.base import Kind

LINEAR = (Kind.COLUMN, Kind.ROW, Kind.QKV, Kind.GATED)
"""Weights of megatron-core's parallel linear layers, whose state dicts also have an empty `_extra_state`."""


def chunk_names(table: WeightTable, layout: Layout, pp_rank: int, vp_rank: int = 0) -> list[str]:
    """Logical names a chunk stores, in order; on a last stage of its own a tied model has an output layer too."""
    layers = layout.layers(pp_rank, vp_rank)
    first, last = layout.is_first(pp_rank, vp_rank), layout.is_last(pp_rank, vp_rank)
    names = []
    for name in table.entries:
        match = LAYER_NUMBER.search(name)
        if match and int(match[0]) in layers or not match and (first if name == EMBEDDING else last):
            names.append(name)
    if last and not first and table.config.tie_word_embeddings:
        names.append(OUTPUT_LAYER)
    return names


def check_layout(table: WeightTable, layout: Layout, padded_rows: int | None = None) -> None:
    """`UsageError` when some tensor does not divide, before anything is written."""
    for entry in table.entries.values():
        entry.shard_map(layout.tp, padded_rows)


def write_mcore(
    source: TensorSource,
    folder: Path,
    layout: Layout,
    iteration: int = 1,
    divisible_by: int = 1,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write all rank files of a model.

    Args:
        folder: the iteration folder, as a rule that of a `StagedDirectory`.
        divisible_by: `--make-vocab-size-divisible-by`.
        progress: told the bytes of each tensor written.

    Raises:
        UsageError: the model does not divide into this layout.
    """
    padded = padded_vocabulary(source.config.vocab_size, layout.tp, divisible_by)
    check_layout(source.table, layout, padded)
    args = upstream_args(source.config, layout, padded, iteration)
    for tp_rank, pp_rank in layout.ranks():
        path = folder / layout.rank_folder(tp_rank, pp_rank) / CHECKPOINT_FILE
        path.parent.mkdir()
        content: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": iteration}
        for vp_rank, key in enumerate(layout.model_keys()):
            content[key] = empty_chunk(source, layout, tp_rank, pp_rank, vp_rank, padded)
        places = write_skeleton(path, content)
        descriptor = os.open(path, os.O_WRONLY)
        try:
            for vp_rank, key in enumerate(layout.model_keys()):
                first_layer = layout.layers(pp_rank, vp_rank).start
                for name in chunk_names(source.table, layout, pp_rank, vp_rank):
                    values = local_share(source, name, layout.tp, tp_rank, padded)
                    fill(places[key][file_key(name, first_layer)], values, descriptor)
                    progress(values.nbytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def local_share(source: TensorSource, name: str, tp: int, tp_rank: int, padded_rows: int | None) -> torch.Tensor:
    """One rank's share of a logical tensor."""
    axis = source.table.shard_map(name, tp, padded_rows)
    return part_of(functools.partial(source.read, name), axis, tp_rank)


def local_shape(shape: tuple[int, ...], axis: AxisMap, part: int) -> tuple[int, ...]:
    """Shape of one rank's share."""
    if axis.dim is None:
        return shape
    return (*shape[: axis.dim], axis.part_size(part), *shape[axis.dim + 1 :])


def empty_chunk(
    source: TensorSource, layout: Layout, tp_rank: int, pp_rank: int, vp_rank: int, padded: int
) -> "OrderedDict[str, torch.Tensor | None]":
    """The state dict of one chunk with tensors of the right shape and no values, `_extra_state` keys included."""
    table = source.table
    first_layer = layout.layers(pp_rank, vp_rank).start
    state: OrderedDict[str, torch.Tensor | None] = OrderedDict()
    for name in chunk_names(table, layout, pp_rank, vp_rank):
        shape = local_shape(table.shape(name), table.shard_map(name, layout.tp, padded), tp_rank)
        key = file_key(name, first_layer)
        state[key] = torch.empty(shape, dtype=source.dtype(name))
        if name != OUTPUT_LAYER and table.entry(name).kind in LINEAR:
            state[key.removesuffix("weight") + "_extra_state"] = None
    if layout.is_last(pp_rank, vp_rank):
        state[OUTPUT_LAYER.removesuffix("weight") + "_extra_state"] = None
    return state
