"""Rows to device batches: which rows a rank reads at a step, cut, padded and moved."""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mindspeed_llm.arguments.data import DataOptions
from mindspeed_llm.data.batch import CutRule, collate, collate_flat, cut_count, first_overlong
from mindspeed_llm.data.dataset import RowSource
from mindspeed_llm.data.sampler import EpochSampler
from mindspeed_llm.errors import InputError
from mindspeed_llm.training.engine import Batch, to_device


class Feed:
    """Global batches of one data set for one rank.

    Every rank of a model replica reads the same rows from the files, so no batch is broadcast.
    """

    def __init__(
        self,
        source: RowSource,
        sampler: EpochSampler,
        options: DataOptions,
        pad_id: int,
        multiple: int,
        device: Any,
        end_id: int | None = None,
    ) -> None:
        """Args:
        pad_id: token behind a row's end.
        end_id: token that ends a text, for --reset-attention-mask and --reset-position-ids.
        multiple: padded lengths are multiples of it; the TP size divides it under sequence parallelism.
        """
        self.source, self.sampler, self.device = source, sampler, device
        self.options, self.pad_id, self.multiple, self.end_id = options, pad_id, multiple, end_id
        self.cut = cut_rule(options)
        check_lengths(source, options)
        self.threads = ThreadPoolExecutor(options.num_workers) if options.num_workers else None
        self.ahead: dict[int, list[Future[Batch]]] = {}  # consumed samples -> micro-batches being prepared

    def batches(self, consumed_samples: int) -> list[Batch]:
        """The micro-batches of the global batch that begins after `consumed_samples`.

        With threads, those of the next global batch are begun before it is asked for.
        """
        if self.threads is None:
            return [self.prepared(rows) for rows in self.sampler.batch(consumed_samples)]
        following = consumed_samples + self.sampler.global_batch_size
        wanted = self.ahead.pop(consumed_samples, None) or self.begin(consumed_samples)
        self.ahead = {following: self.begin(following)}
        return [batch.result() for batch in wanted]

    def begin(self, consumed_samples: int) -> "list[Future[Batch]]":
        """Prepare the micro-batches of a global batch in the background."""
        return [self.threads.submit(self.prepared, rows) for rows in self.sampler.batch(consumed_samples)]

    def prepared(self, rows: list[int]) -> Batch:
        """One micro-batch on the device."""
        return to_device(self.collate([self.source[row] for row in rows]), self.device)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """One micro-batch as numpy arrays."""
        if self.options.lays_out_flat:
            return collate_flat(
                rows,
                self.pad_id,
                self.options.seq_length,
                self.multiple,
                cut=self.cut,
                attention_end=self.end_id if self.options.reset_attention_mask else None,
                position_end=self.end_id if self.options.reset_position_ids else None,
            )
        return collate(
            rows,
            self.pad_id,
            self.options.seq_length,
            self.multiple,
            pad_to_longest=self.options.no_pad_to_seq_lengths,
            cut=self.cut,
        )

    def walk(self, global_batches: int) -> Iterator[list[Batch]]:
        """The first `global_batches` global batches, for validation."""
        size = self.sampler.global_batch_size
        return (self.batches(number * size) for number in range(global_batches))


def cut_rule(options: DataOptions) -> CutRule:
    """The rule for rows longer than --seq-length (contract of upstream's training flags)."""
    if options.no_cut_token:
        return CutRule.REFUSE
    return CutRule.HARD if options.cut_max_seqlen else CutRule.TURNS


def check_lengths(source: RowSource, options: DataOptions) -> None:
    """Refuse over-long rows before the model is built when --no-cut-token asks for it.

    Raises:
        InputError: the first such row, by number.
    """
    if options.no_cut_token and (row := first_overlong(source, options.seq_length)) is not None:
        raise InputError(
            f"{cut_count(source, options.seq_length)} rows are longer than --seq-length {options.seq_length}, first "
            f"row {row} with {int(source.lengths[row])} tokens, and --no-cut-token forbids to cut; raise --seq-length"
        )


def length_multiple(options: DataOptions, parts: int) -> int:
    """What padded lengths must be a multiple of: the option's, and what the layout cuts them into."""
    multiple = options.pad_to_multiple_of if options.no_pad_to_seq_lengths and not options.lays_out_flat else 1
    return math.lcm(multiple, parts)
