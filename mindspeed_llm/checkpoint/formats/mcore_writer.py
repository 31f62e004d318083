"""Writing a model as per-rank Megatron `torch` files, in any layout, a block of one tensor in memory at a time."""

import functools
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from mindspeed_llm.checkpoint.formats.blocks import Place, Progress, copy_part, no_progress
from mindspeed_llm.checkpoint.formats.lazy import TensorSource, part_of
from mindspeed_llm.checkpoint.formats.mcore_names import Dialect, FileTensor, factor_tensors, file_tensors
from mindspeed_llm.checkpoint.formats.torch_file import write_skeleton
from mindspeed_llm.checkpoint.kinds import padded_vocabulary
from mindspeed_llm.checkpoint.layout import CHECKPOINT_FILE, Layout, Rank
from mindspeed_llm.checkpoint.tables import OUTPUT_LAYER, WeightTable, is_lora
from mindspeed_llm.checkpoint.upstream_args import upstream_args
from mindspeed_llm.models.families.base import Kind

LINEAR = (Kind.COLUMN, Kind.ROW, Kind.QKV, Kind.GATED)
"""Weights of megatron-core's parallel linear layers, whose state dicts also have an empty `_extra_state`."""


def check_layout(table: WeightTable, layout: Layout, padded_rows: int | None = None) -> None:
    """`UsageError` when some tensor or the experts do not divide, before anything is written."""
    layout.check_experts(table.config.num_experts)
    for entry in table.entries.values():
        entry.shard_map(layout.tp if entry.expert is None else layout.etp, padded_rows)


def write_mcore(
    source: TensorSource,
    folder: Path,
    layout: Layout,
    iteration: int = 1,
    divisible_by: int = 1,
    progress: Progress = no_progress,
    dialect: Dialect | None = None,
) -> None:
    """Write all rank files of a model.

    Args:
        folder: the iteration folder, as a rule that of a `StagedDirectory`.
        divisible_by: `--make-vocab-size-divisible-by`.
        progress: told the bytes of each block written.
        dialect: whose names the files use; Megatron's local ones when None.

    Raises:
        UsageError: the model does not divide into this layout.
    """
    dialect = dialect or Dialect()
    padded = padded_vocabulary(source.config.vocab_size, layout.tp, divisible_by)
    check_layout(source.table, layout, padded)
    args = upstream_args(source.config, layout, padded, iteration, dialect)
    for rank in layout.ranks():
        chunks = [file_tensors(source.table, layout, rank, vp_rank, dialect, padded) for vp_rank in range(layout.vp)]
        write_rank(source, folder, layout, rank, chunks, {"args": args, "iteration": iteration}, progress)


def write_factors(
    source: TensorSource, folder: Path, layout: Layout, iteration: int = 1, progress: Progress = no_progress
) -> None:
    """Write the LoRA factors of an adapter as rank files, as training with `--lora-ckpt-filter` saves them.

    Args:
        source: factors `X.lora_A.weight`, `X.lora_B.weight` by logical name.

    Raises:
        UsageError: the model does not divide into this layout.
    """
    check_layout(source.table, layout)
    padded = padded_vocabulary(source.config.vocab_size, layout.tp)
    args = upstream_args(source.config, layout, padded, iteration)
    for rank in layout.ranks():
        chunks = [factor_tensors(source, layout, rank, vp_rank) for vp_rank in range(layout.vp)]
        write_rank(source, folder, layout, rank, chunks, {"args": args, "iteration": iteration}, progress)


def write_rank(
    source: TensorSource,
    folder: Path,
    layout: Layout,
    rank: Rank,
    chunks: list[list[FileTensor]],
    about: dict[str, Any],
    progress: Progress,
) -> None:
    """Write one rank's file: `about`, and the tensors of its chunks."""
    path = folder / layout.rank_folder(*rank) / CHECKPOINT_FILE
    path.parent.mkdir()
    content: dict[str, Any] = {**about, "checkpoint_version": 3.0}
    for vp_rank, key in enumerate(layout.model_keys()):
        content[key] = empty_chunk(source, chunks[vp_rank], layout.is_last(rank.pp, vp_rank))
    places = write_skeleton(path, content)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for key, tensors in zip(layout.model_keys(), chunks, strict=True):
            for tensor in tensors:
                copy_tensor(source, tensor, descriptor, places[key][tensor.key].offset, progress)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_tensor(source: TensorSource, tensor: FileTensor, descriptor: int, offset: int, progress: Progress) -> None:
    """Write the shares that make up one file tensor, which begins at the byte `offset`."""
    for share in tensor.shares:
        dtype = source.dtype(share.name)
        place = Place(descriptor, offset + share.offset * dtype.itemsize, dtype, share.shape, share.transposed)
        copy_part(source, share.name, share.axis, share.part, place, progress)


def empty_chunk(source: TensorSource, tensors: list[FileTensor], last: bool) -> "OrderedDict[str, torch.Tensor | None]":
    """The state dict of one chunk with tensors of the right shape and no values, `_extra_state` keys included."""
    state: OrderedDict[str, torch.Tensor | None] = OrderedDict()
    for tensor in tensors:
        name = tensor.shares[0].name
        state[tensor.key] = torch.empty(tensor.shape, dtype=source.dtype(name))
        if is_lora(name):
            continue
        linear = name != OUTPUT_LAYER and source.table.entry(name).kind in LINEAR
        if linear and len(tensor.shares) == 1 and tensor.key.endswith(".weight"):
            state[tensor.key.removesuffix("weight") + "_extra_state"] = None
    if last and not any(is_lora(tensor.shares[0].name) for tensor in tensors):
        state[OUTPUT_LAYER.removesuffix("weight") + "_extra_state"] = None
    return state


def local_share(source: TensorSource, name: str, tp: int, tp_rank: int, padded_rows: int | None) -> torch.Tensor:
    """One rank's share of a logical tensor."""
    axis = source.table.shard_map(name, tp, padded_rows)
    return part_of(functools.partial(source.read, name), axis, tp_rank)
