"""Blends of data sets: shares as asked, no row more often than another by more than one, nothing out of place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_llm.data.blend import Blend, parse_data_path, shares_of
from mindspeed_llm.errors import InputError, UsageError


def test_a_pass_holds_the_shares_asked_for_spread_evenly_over_it() -> None:
    blend = Blend([90, 10, 20], [0.5, 0.25, 0.25], seed=3, shuffle=False)
    rows = blend.rows(0)
    assert len(rows) == len(blend) == 120 and blend.counts.tolist() == [60, 30, 30]
    part = np.searchsorted([90, 100], rows, side="right")
    assert np.bincount(part).tolist() == [60, 30, 30]
    for begin in range(0, 120, 12):
        assert np.bincount(part[begin : begin + 12]).tolist() == [6, 3, 3]
    assert rows[part == 0].tolist() == list(range(60)) and rows[part == 2].tolist() == [
        *range(100, 120),
        *range(100, 110),
    ]
    assert blend.rows(1)[part == 0].tolist() == [*range(60, 90), *range(30)], "a pass takes up where the last stopped"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.05, 1)), min_size=1, max_size=4),
    st.integers(0, 3),
    st.booleans(),
    st.integers(1, 9),
)
def test_no_row_of_a_data_set_comes_more_often_than_another_by_more_than_one(
    parts: list[tuple[int, float]], seed: int, shuffle: bool, passes: int
) -> None:
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    blend = Blend(sizes, weights, seed, shuffle)
    seen = np.zeros(sum(sizes), np.int64)
    for number in range(passes):
        rows = blend.rows(number)
        assert len(rows) == sum(sizes)
        seen += np.bincount(rows, minlength=len(seen))
        for begin, size, count in zip(np.cumsum([0, *sizes]), sizes, blend.counts.tolist(), strict=False):
            times = seen[begin : begin + size]
            assert times.max() - times.min() <= 1 and times.sum() == count * (number + 1)


def test_the_seed_and_the_pass_draw_the_rows() -> None:
    drawn = [
        Blend([100, 100], [0.3, 0.7], seed).rows(number).tolist() for seed, number in ((1, 0), (1, 0), (2, 0), (1, 1))
    ]
    assert drawn[0] == drawn[1] and len({tuple(sorted(rows)) for rows in drawn}) == 3


def test_shares_sum_to_the_total_and_are_within_one_of_the_exact_ones() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        weights = draw.random(draw.integers(1, 6)) + 0.05
        total = int(draw.integers(20, 1000))
        counts = shares_of(total, weights.tolist())
        assert counts.sum() == total and counts.min() >= 1
        assert np.all(np.abs(counts - weights / weights.sum() * total) <= 1)


def test_weights_stand_before_every_prefix_or_nowhere() -> None:
    assert parse_data_path(["a", "b"]) == ([], ["a", "b"])
    assert parse_data_path(["3", "a", "1", "b"]) == ([0.75, 0.25], ["a", "b"])
    for words in (["0.3", "a", "b"], ["0.3", "a", "0.7"], ["a", "0.3", "b", "0.7"], ["0", "a", "1", "b"]):
        with pytest.raises(UsageError, match="--data-path"):
            parse_data_path(words)


def test_an_empty_data_set_and_missing_weights_are_refused() -> None:
    with pytest.raises(InputError, match="data set 2 of the blend holds no rows"):
        Blend([5, 0], [0.5, 0.5], 0)
    with pytest.raises(UsageError, match="2 data sets"):
        Blend([5, 2], [1.0], 0)
