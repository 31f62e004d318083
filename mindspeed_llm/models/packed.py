"""Packed rows on their way through the model: megatron-core's `PackedSeqParams` with what our attention needs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from mindspeed_llm.device.segments import Segments
from mindspeed_llm.models.context import Cut, RowsCut, parts_of, zigzag_rows


@dataclass
class PackedRows(PackedSeqParams):
    """Rows one behind the other in a single sequence, [s, 1, h] in the model.

    megatron-core's format name stays "sbhd", which keeps heads and batch apart in every shape; its own "thd" would
    only squeeze the batch dimension away.

    Attributes:
        segments: tokens that see each other.
        position_lengths: tokens that are counted from 0 together; the same as the segments' unless only one of
            attention and positions starts anew.
        rows_cut: under context parallelism, which of the tokens each process has and what this one computes.
    """

    segments: Segments | None = None
    position_lengths: tuple[int, ...] = ()
    rows_cut: RowsCut | None = None

    @property
    def cut(self) -> Cut | None:
        """Which positions each process has under context parallelism; None without."""
        return None if self.rows_cut is None else self.rows_cut.cut


def packed_rows(
    lengths: Sequence[int], position_lengths: Sequence[int], device: torch.device, place: tuple[int, int] = (0, 1)
) -> PackedRows:
    """Describe a sequence of segments of these lengths, with positions counted within `position_lengths`.

    Args:
        place: this process's rank in context parallelism, and how many there are; their double divides the sequence.
    """
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    segments, (rank, processes) = Segments(tuple(lengths), bounds), place
    cut = zigzag_rows(lengths, processes) if processes > 1 else None
    return PackedRows(
        qkv_format="sbhd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=segments.longest,
        max_seqlen_kv=segments.longest,
        segments=segments,
        position_lengths=tuple(position_lengths),
        rows_cut=None if cut is None else RowsCut(cut, parts_of(cut.runs[rank], lengths, device)),
    )
