"""The sampler's promises: every row once per epoch, ranks disjoint, resume at any sample."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_llm.data.blend import Blend
from mindspeed_llm.data.sampler import NO_ROW, EpochSampler, LengthGroupedSampler
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


LENGTHS = np.random.default_rng(2).lognormal(5, 0.8, 500).astype(int) + 1


def grouped(rank: int = 0, ranks: int = 2) -> LengthGroupedSampler:
    return LengthGroupedSampler(LENGTHS, 4, rank, ranks, 2, seed=7)


def test_grouping_by_length_reads_every_row_once_an_epoch_on_disjoint_ranks() -> None:
    seen = []
    for consumed in range(0, 496, 16):
        for rank in range(2):
            seen += [row for micro in grouped(rank).batch(consumed) for row in micro]
    rest = [grouped().batch(496)[0]]
    assert len(set(seen)) == len(seen) == 496 and set(seen) | set(rest[0]) == set(range(500))


def test_grouping_by_length_pads_little_and_still_shuffles() -> None:
    def padded(sampler: EpochSampler) -> float:
        batches = [micro for consumed in range(0, 496, 16) for micro in sampler.batch(consumed)]
        return sum(len(m) * max(LENGTHS[m]) for m in batches) / sum(LENGTHS[m].sum() for m in batches) - 1

    assert padded(grouped()) < 0.25 < 0.5 < padded(EpochSampler(500, 4, 0, 2, 2, seed=7))
    first = [LENGTHS[grouped().batch(consumed)[0]].max() for consumed in range(0, 496, 16)]
    assert first[0] == max(first) == LENGTHS.max(), "the longest batch comes first"
    assert first[1:] != sorted(first[1:], reverse=True)
    assert grouped().batch(0) != grouped().batch(500), "another epoch, another order"


def test_grouping_by_length_resumes_at_any_sample() -> None:
    assert [grouped().batch(n) for n in (16, 480, 500)] == [grouped().batch(n) for n in (16, 480, 500)]
    small = LengthGroupedSampler(LENGTHS[:5], 4, 0, 1, 2, seed=7)
    assert sorted(row for micro in small.batch(0) for row in micro)[:5] and len(small.batch(3)) == 2


KINDS = ("shuffled", "in order", "blend", "blend in order", "grouped", "grouped blend")


def make(kind: str, rows: int, seed: int) -> Callable[..., EpochSampler]:
    """A sampler of each kind that training builds, on `rows` rows in data sets of a third and the rest."""
    sizes = [max(rows // 3, 1), rows - max(rows // 3, 1)] if rows > 1 else [1]
    blend = Blend(sizes, [0.5, 0.2][: len(sizes)], seed, "order" not in kind) if "blend" in kind else None
    lengths = np.random.default_rng(rows).integers(1, 50, rows)

    def sampler(micro: int, rank: int, ranks: int, micro_batches: int) -> EpochSampler:
        if "grouped" in kind:
            return LengthGroupedSampler(lengths, micro, rank, ranks, micro_batches, seed=seed, blend=blend)
        return EpochSampler(rows, micro, rank, ranks, micro_batches, seed, "order" not in kind, blend=blend)

    return sampler


def read(sampler: Callable[..., EpochSampler], sizes: tuple[int, int, int], consumed: int) -> list[int]:
    """The rows of one global batch over all ranks, in the order of the stream; from samplers made afresh."""
    micro, ranks, micro_batches = sizes
    per_rank = [sampler(micro, rank, ranks, micro_batches).batch(consumed) for rank in range(ranks)]
    return [row for m in range(micro_batches) for batch in per_rank for row in batch[m]]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 70),
    st.sampled_from([(1, 1, 12), (12, 1, 1), (2, 3, 2), (3, 2, 2), (1, 4, 3), (1, 6, 2)]),
    st.integers(0, 300),
    st.integers(0, 5),
)
def test_any_step_reads_its_stretch_of_one_stream_whatever_the_layout_and_whoever_resumes(
    kind: str, rows: int, sizes: tuple[int, int, int], consumed: int, seed: int
) -> None:
    sampler = make(kind, rows, seed)
    found = read(sampler, sizes, consumed)
    # straight from the promise: epoch after epoch, each the order of its own number
    whole = sampler(12, 0, 1, 1)
    stream = [int(row) for epoch in range((consumed + 12) // rows + 1) for row in whole._draw_order(epoch)]
    assert found == stream[consumed : consumed + 12]
    one_epoch = np.bincount(stream[:rows], minlength=rows)
    blend = make(kind, rows, seed)(1, 0, 1, 1).blend
    expected = np.bincount(blend.rows(0), minlength=rows) if blend else np.ones(rows)
    assert one_epoch.tolist() == expected.tolist(), "an epoch is complete"


@given(st.integers(1, 40), st.sampled_from([(1, 1, 4), (2, 2, 1), (1, 4, 1)]), st.sampled_from(["plain", "blend"]))
def test_once_reads_every_row_a_single_time_and_then_none(rows: int, sizes: tuple[int, int, int], kind: str) -> None:
    blend = Blend([rows], [1.0], 3, shuffle=False) if kind == "blend" else None

    def sampler(micro: int, rank: int, ranks: int, micro_batches: int) -> EpochSampler:
        return EpochSampler(rows, micro, rank, ranks, micro_batches, 3, False, blend=blend, once=True)

    steps = -(-rows // 4)
    found = [row for step in range(steps) for row in read(sampler, sizes, step * 4)]
    assert found == [*range(rows), *[NO_ROW] * (steps * 4 - rows)]
