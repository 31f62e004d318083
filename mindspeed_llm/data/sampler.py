"""Which rows a rank reads next: a pure function of how many samples the run has consumed."""

from functools import lru_cache

import numpy as np

from mindspeed_llm.data.blend import Blend
from mindspeed_llm.data.index_cache import IndexCache, lengths_origin
from mindspeed_llm.errors import InputError, UsageError

NO_ROW = -1  # stands where `once` has no row left


class EpochSampler:
    """Rows of global batches, shuffled anew in each epoch; a batch may join the end of one epoch to the next.

    The stream of samples is epoch after epoch, each holding every row once. A global batch is the next
    `num_microbatches * micro_batch_size * data_parallel_size` samples of it: micro-batch after micro-batch, within
    one the ranks in turn. Nothing is remembered between calls, so that a run resumes exactly at any sample.
    """

    def __init__(
        self,
        num_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        num_microbatches: int,
        seed: int,
        shuffle: bool = True,
        cache: IndexCache | None = None,
        blend: Blend | None = None,
        once: bool = False,
    ) -> None:
        """Args:
            num_samples: rows of the data set, which are also those of an epoch.
            micro_batch_size: rows a rank computes at once.
            data_parallel_rank, data_parallel_size: this rank among those that share the rows.
            num_microbatches: micro-batches of a rank per global batch.
            seed: with the epoch's number decides its order.
            shuffle: False keeps the rows' order.
            cache: where orders are kept for all ranks; left out, every rank draws them itself.
            blend: which rows an epoch holds where data sets have shares; left out, each row once.
            once: there is one epoch only, and `NO_ROW` behind it.

        Raises:
            InputError: there are no rows.
            UsageError: a size below one, or a rank outside its group.
        """
        if num_samples < 1:
            raise InputError("the data set holds no rows; check the input and the report of preprocess_data.py")
        if min(micro_batch_size, data_parallel_size, num_microbatches) < 1:
            raise UsageError(
                f"batch sizes must be at least 1: micro-batch {micro_batch_size}, data-parallel size "
                f"{data_parallel_size}, {num_microbatches} micro-batches per step"
            )
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise UsageError(f"data-parallel rank {data_parallel_rank} of {data_parallel_size}")
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.num_microbatches = num_microbatches
        self.seed = seed
        self.shuffle = shuffle
        self.cache = cache
        self.blend = blend
        self.once = once
        # a batch touches few epochs; the cache only saves drawing an epoch's order again
        self._order = lru_cache(maxsize=2)(self._kept_order)

    @property
    def global_batch_size(self) -> int:
        """Samples all ranks together consume per step."""
        return self.num_microbatches * self.micro_batch_size * self.data_parallel_size

    def batch(self, consumed_samples: int) -> list[list[int]]:
        """This rank's rows of the next global batch: one list per micro-batch.

        Args:
            consumed_samples: samples all ranks together have consumed since the run began.
        """
        stride = self.micro_batch_size * self.data_parallel_size
        first = consumed_samples + self.data_parallel_rank * self.micro_batch_size
        return [
            [self._row(first + micro * stride + k) for k in range(self.micro_batch_size)]
            for micro in range(self.num_microbatches)
        ]

    def global_batch(self, consumed_samples: int) -> list[int]:
        """All ranks' rows of the next global batch: micro-batch after micro-batch, within one the ranks in turn."""
        return [self._row(consumed_samples + k) for k in range(self.global_batch_size)]

    def epoch(self, consumed_samples: int) -> float:
        """How often the data have been gone through after that many samples."""
        return consumed_samples / self.num_samples

    def _row(self, position: int) -> int:
        epoch, within = divmod(position, self.num_samples)
        if self.once and epoch:
            return NO_ROW
        return int(self._order(epoch)[within]) if self.shuffle or self.blend else within

    def _kept_order(self, epoch: int) -> np.ndarray:
        """The order of one epoch, from the cache where there is one."""
        if self.cache is None:
            return self._draw_order(epoch)
        return self.cache.array({**self._origin(), "epoch": epoch}, lambda: self._draw_order(epoch))

    def _origin(self) -> dict[str, object]:
        """What an epoch's order follows from, besides its number."""
        return {"kind": "shuffled", "rows": self.num_samples, **self._drawn_from()}

    def _drawn_from(self) -> dict[str, object]:
        """What an epoch's rows and their order follow from, besides its number and the rows themselves."""
        parts = {"sizes": self.blend.sizes, "weights": self.blend.weights} if self.blend else None
        return {"seed": self.seed, "shuffle": self.shuffle, "blend": parts}

    def _draw_order(self, epoch: int) -> np.ndarray:
        """[num_samples] rows in the order of one epoch."""
        rows = np.arange(self.num_samples) if self.blend is None else self.blend.rows(epoch)
        return np.random.default_rng([self.seed, epoch]).permutation(rows) if self.shuffle else rows


class LengthGroupedSampler(EpochSampler):
    """Rows of like length share a global batch, so that little is padded and the ranks have equal work.

    An epoch is shuffled, cut into windows of some global batches, and sorted by length within each; then the global
    batches are put into a random order, the longest one first, so that what does not fit into memory fails at once.
    What stands behind the last whole global batch keeps its place at the end.
    """

    WINDOW = 50  # global batches sorted together: more of them make batches more alike and the order less random

    def __init__(
        self, lengths: np.ndarray, *sizes: int, seed: int, cache: IndexCache | None = None, blend: Blend | None = None
    ) -> None:
        """Args:
        lengths: [rows] tokens of each row.
        sizes: micro_batch_size, data_parallel_rank, data_parallel_size, num_microbatches, as `EpochSampler` has them.
        """
        self.lengths = np.asarray(lengths)
        super().__init__(len(self.lengths), *sizes, seed=seed, cache=cache, blend=blend)

    def _origin(self) -> dict[str, object]:
        return {
            "kind": "grouped by length", "rows": lengths_origin(self.lengths), **self._drawn_from(),
            "global_batch_size": self.global_batch_size, "window": self.WINDOW,
        }  # fmt: skip

    def _draw_order(self, epoch: int) -> np.ndarray:
        """[num_samples] rows in the order of one epoch."""
        order = super()._draw_order(epoch)
        whole = len(order) // self.global_batch_size
        # a small data set keeps four windows, so that its epochs differ
        window = min(self.WINDOW, max(whole // 4, 1)) * self.global_batch_size
        for begin in range(0, len(order), window):
            part = order[begin : begin + window]
            order[begin : begin + window] = part[np.argsort(-self.lengths[part], kind="stable")]
        if whole < 2:
            return order
        batches = order[: whole * self.global_batch_size].reshape(whole, -1)
        turn = np.random.default_rng([self.seed, epoch, whole]).permutation(whole)
        longest = int(np.argmax(self.lengths[batches[turn]].max(axis=1)))
        turn[[0, longest]] = turn[[longest, 0]]
        order[: whole * self.global_batch_size] = batches[turn].ravel()
        return order
