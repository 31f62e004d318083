"""Which rows a rank reads next: a pure function of how many samples the run has consumed."""

from functools import lru_cache

import numpy as np

from mindspeed_llm.errors import InputError, UsageError


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
    ) -> None:
        """Args:
            num_samples: rows of the data set.
            micro_batch_size: rows a rank computes at once.
            data_parallel_rank, data_parallel_size: this rank among those that share the rows.
            num_microbatches: micro-batches of a rank per global batch.
            seed: with the epoch's number decides its order.
            shuffle: False keeps the rows' order.

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
        # a batch touches few epochs; the cache only saves drawing an epoch's order again
        self._order = lru_cache(maxsize=2)(self._draw_order)

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

    def epoch(self, consumed_samples: int) -> float:
        """How often the data have been gone through after that many samples."""
        return consumed_samples / self.num_samples

    def _row(self, position: int) -> int:
        epoch, within = divmod(position, self.num_samples)
        return int(self._order(epoch)[within]) if self.shuffle else within

    def _draw_order(self, epoch: int) -> np.ndarray:
        """[num_samples] rows in the order of one epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
