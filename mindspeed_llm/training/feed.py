"""Rows to device batches: which rows a rank reads at a step, cut, padded and moved."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mindspeed_llm.arguments.data import DataOptions
from mindspeed_llm.data.batch import CutRule, collate, collate_flat, cut_count, first_overlong
from mindspeed_llm.data.dataset import RowSource, Sample
from mindspeed_llm.data.encode import IGNORE_INDEX
from mindspeed_llm.data.pairs import in_pairs
from mindspeed_llm.data.sampler import NO_ROW, EpochSampler
from mindspeed_llm.errors import InputError
from mindspeed_llm.training.engine import Batch, to_device

Arrays = dict[str, Any]
Collate = Callable[[Sequence[Sample]], Arrays]


class Feed:
    """Global batches of one data set for one rank.

    Every rank of a model replica reads the same rows from the files, so no batch is broadcast. Threads read and lay
    out the next global batch while a step computes; only the step's own thread touches the device.
    """

    def __init__(
        self, source: RowSource, sampler: EpochSampler, collate: Collate, device: Any, threads: int = 0
    ) -> None:
        """Args:
        source: the rows, by the numbers the sampler gives.
        collate: rows to the arrays of a micro-batch, see `collate_of`.
        threads: that prepare the next global batch; 0 prepares each one when it is asked for.
        """
        self.source, self.sampler, self.collate, self.device = source, sampler, collate, device
        self.threads = ThreadPoolExecutor(threads, "feed") if threads else None
        self.ahead: dict[int, list[Future[Arrays]]] = {}  # consumed samples -> micro-batches being prepared

    def batches(self, consumed_samples: int) -> list[Batch]:
        """The micro-batches of the global batch that begins after `consumed_samples`.

        With threads, those of the next global batch are begun before it is asked for.
        """
        return [to_device(arrays, self.device) for arrays in self.arrays(consumed_samples)]

    def arrays(self, consumed_samples: int) -> list[Arrays]:
        """`batches` before they are moved to the device."""
        if self.threads is None:
            return [self.prepared(rows) for rows in self.sampler.batch(consumed_samples)]
        following = consumed_samples + self.sampler.global_batch_size
        wanted = self.ahead.pop(consumed_samples, None) or self.begin(consumed_samples)
        self.ahead = {following: self.begin(following)}
        return [batch.result() for batch in wanted]

    def begin(self, consumed_samples: int) -> "list[Future[Arrays]]":
        """Prepare the micro-batches of a global batch in the background, the choice of their rows included."""
        chosen = self.threads.submit(self.sampler.batch, consumed_samples)
        count = self.sampler.num_microbatches
        return [self.threads.submit(lambda n=n: self.prepared(chosen.result()[n])) for n in range(count)]

    def prepared(self, rows: list[int]) -> Arrays:
        """One micro-batch; `NO_ROW` becomes a row in which nothing is trained."""
        return self.collate([NOTHING if row == NO_ROW else self.source[row] for row in rows])

    def walk(self, global_batches: int) -> Iterator[list[Batch]]:
        """The first `global_batches` global batches, for validation."""
        size = self.sampler.global_batch_size
        return (self.batches(number * size) for number in range(global_batches))

    def close(self) -> None:
        """Let the threads go; what they prepare is not waited for."""
        if self.threads is not None:
            self.threads.shutdown(wait=False, cancel_futures=True)


NOTHING: Sample = {
    "input_ids": np.zeros(1, np.int32),
    "labels": np.full(1, IGNORE_INDEX, np.int32),
    "attention_mask": np.ones(1, np.int32),
    "name": "a row that fills the last batch",
}


def collate_of(
    options: DataOptions, pad_id: int, multiple: int, end_id: int | None = None, pairs: bool = False
) -> Collate:
    """How the options make rows into a micro-batch: the one place that chooses.

    Args:
        pad_id: token behind a row's end.
        multiple: padded lengths are multiples of it; the TP size divides it under sequence parallelism.
        end_id: token that ends a text, for --reset-attention-mask and --reset-position-ids.
        pairs: the rows are pairs of answers; long ones are cut at their end, so that both keep the same prompt.
    """
    if pairs:
        cut = replace(options, cut_max_seqlen=not options.no_cut_token)
        return in_pairs(collate_of(cut, pad_id, multiple, end_id))
    common = {
        "pad_id": pad_id,
        "seq_length": options.seq_length,
        "pad_to_multiple_of": multiple,
        "cut": cut_rule(options),
    }
    if not options.lays_out_flat:
        return partial(collate, pad_to_longest=options.no_pad_to_seq_lengths, **common)
    return partial(
        collate_flat,
        attention_end=end_id if options.reset_attention_mask else None,
        position_end=end_id if options.reset_position_ids else None,
        **common,
    )


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
