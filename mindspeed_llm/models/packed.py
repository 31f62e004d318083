"""Packed rows on their way through the model: megatron-core's `PackedSeqParams` with what our attention needs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from mindspeed_llm.device.segments import Segments


@dataclass
class PackedRows(PackedSeqParams):
    """Rows one behind the other in a single sequence, [s, 1, h] in the model.

    megatron-core's format name stays "sbhd", which keeps heads and batch apart in every shape; its own "thd" would
    only squeeze the batch dimension away.

    Attributes:
        segments: tokens that see each other.
        position_lengths: tokens that are counted from 0 together; the same as the segments' unless only one of
            attention and positions starts anew.
    """

    segments: Segments | None = None
    position_lengths: tuple[int, ...] = ()


def packed_rows(lengths: Sequence[int], position_lengths: Sequence[int], device: torch.device) -> PackedRows:
    """Describe a sequence of segments of these lengths, with positions counted within `position_lengths`."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    segments = Segments(tuple(lengths), bounds)
    return PackedRows(
        qkv_format="sbhd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=segments.longest,
        max_seqlen_kv=segments.longest,
        segments=segments,
        position_lengths=tuple(position_lengths),
    )
