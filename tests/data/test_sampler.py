"""The sampler's promises: every row once per epoch, ranks disjoint, resume at any sample."""

import pytest

from mindspeed_llm.data.sampler import EpochSampler
from mindspeed_llm.errors import InputError, UsageError


def stream(num_samples: int, steps: int, dp: int = 1, micro: int = 1, batches: int = 1, **kwargs) -> list[list[int]]:
    """The rows of each global batch in the order of the stream, all ranks together."""
    samplers = [EpochSampler(num_samples, micro, rank, dp, batches, **{"seed": 7, **kwargs}) for rank in range(dp)]
    size = samplers[0].global_batch_size
    result = []
    for step in range(steps):
        per_rank = [sampler.batch(step * size) for sampler in samplers]
        result.append([row for m in range(batches) for rank in per_rank for row in rank[m]])
    return result


@pytest.mark.parametrize(("dp", "micro", "batches"), [(1, 1, 1), (2, 1, 2), (2, 3, 1), (3, 2, 2)])
def test_every_row_comes_once_per_epoch_over_all_ranks(dp: int, micro: int, batches: int) -> None:
    rows = sum(stream(29, 29 * 4, dp, micro, batches), [])
    epochs = [rows[i : i + 29] for i in range(0, len(rows) - 28, 29)]
    assert len(epochs) >= 4
    assert all(sorted(epoch) == list(range(29)) for epoch in epochs)
    assert epochs[0] != epochs[1], "each epoch has its own order"


def test_the_stream_does_not_depend_on_how_batches_are_divided() -> None:
    plain = sum(stream(50, 48, 1, 1, 1), [])
    assert plain == sum(stream(50, 12, 2, 1, 2), []) == sum(stream(50, 6, 2, 2, 2), []) == sum(stream(50, 4, 1, 12), [])


def test_a_resumed_run_reads_what_the_uninterrupted_one_would() -> None:
    whole = EpochSampler(17, 2, 1, 2, 3, seed=5)
    expected = [whole.batch(consumed) for consumed in range(0, 240, 12)]
    for k, batch in enumerate(expected):
        assert EpochSampler(17, 2, 1, 2, 3, seed=5).batch(12 * k) == batch


def test_a_batch_longer_than_the_data_goes_round_several_times() -> None:
    rows = sum(EpochSampler(3, 4, 0, 1, 2, seed=1).batch(0), [])
    assert len(rows) == 8 and sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]


def test_without_shuffling_rows_keep_their_order() -> None:
    assert sum(stream(5, 7, shuffle=False), []) == [0, 1, 2, 3, 4, 0, 1]


def test_seeds_give_different_orders_and_the_same_seed_the_same() -> None:
    assert stream(40, 40, seed=1) != stream(40, 40, seed=2)
    assert stream(40, 40, seed=1) == stream(40, 40, seed=1)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="holds no rows"):
        EpochSampler(0, 1, 0, 1, 1, seed=0)
    with pytest.raises(UsageError, match="at least 1"):
        EpochSampler(5, 0, 0, 1, 1, seed=0)
    with pytest.raises(UsageError, match="rank 2 of 2"):
        EpochSampler(5, 1, 2, 2, 1, seed=0)
