"""Packing: upstream's greedy way against its quadratic definition, ours against the least number of packs."""

import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindspeed_llm.data.packing import greedy_packs, pack_rows


def by_definition(lengths: list[int], capacity: int) -> list[list[int]]:
    """Take the longest row that fits, of equal ones the last, until none fits; then the next pack."""
    left = list(range(len(lengths)))
    packs = []
    while left:
        pack, room = [], capacity
        while fitting := [row for row in left if lengths[row] <= room]:
            row = max(fitting, key=lambda r: (lengths[r], r))
            left.remove(row)
            pack.append(row)
            room -= lengths[row]
        packs.append(pack)
    return packs


def test_packing_needs_few_bytes_per_row() -> None:
    peaks = []
    for count in (200_000, 600_000):
        lengths = np.random.default_rng(1).integers(20, 2000, count, dtype=np.int32)
        tracemalloc.start()
        pack_rows(lengths, 2048, 1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 400_000 < 24, "with 8 bytes of hash beside them that is 32"


def test_packs_equal_the_definition() -> None:
    draw = random.Random(3)
    for _ in range(50):
        lengths = [draw.randint(1, 60) for _ in range(draw.randint(0, 60))]
        assert greedy_packs(lengths, 60) == by_definition(lengths, 60)


def test_every_row_is_packed_once_within_the_capacity() -> None:
    draw = random.Random(4)
    lengths = [min(max(int(draw.lognormvariate(5, 1)), 1), 2047) for _ in range(20_000)]
    packs = greedy_packs(lengths, 2047)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert max(sum(lengths[row] for row in pack) for pack in packs) <= 2047


@pytest.mark.parametrize("length", [0, 61])
def test_a_row_that_fits_no_pack_is_an_error(length: int) -> None:
    with pytest.raises(ValueError, match="row 1 of"):
        greedy_packs([5, length], 60)
    with pytest.raises(ValueError, match="row 1 of"):
        pack_rows(np.array([5, length]), 60, 0)


def alpaca_like(count: int) -> np.ndarray:
    """Lengths as instruction data have them: many short, few long."""
    draw = np.random.default_rng(11)
    return np.clip(draw.lognormal(4.6, 0.8, count).astype(int) + 25, 20, 2040)


@pytest.mark.parametrize("capacity", [2048, 4096])
@pytest.mark.parametrize("count", [52_000, 1_000_000])
def test_instruction_data_fill_their_packs_and_need_hardly_more_than_the_least_number(
    capacity: int, count: int
) -> None:
    lengths = alpaca_like(count)
    packs = pack_rows(lengths, capacity, seed=1)
    least = -(-int(lengths.sum()) // capacity)
    assert lengths.sum() / (len(packs) * capacity) >= 0.995
    assert len(packs) <= least * 1.001
    assert np.array_equal(np.sort(packs.rows), np.arange(count))
    assert max(np.add.reduceat(lengths[packs.rows], packs.ends - np.diff(packs.ends, prepend=0))) <= capacity


@given(st.lists(st.integers(1, 40), max_size=80), st.integers(40, 90), st.integers(0, 3))
def test_every_row_is_in_one_pack_whatever_the_lengths(lengths: list[int], capacity: int, seed: int) -> None:
    packs = list(pack_rows(np.array(lengths, int), capacity, seed))
    assert sorted(row for pack in packs for row in pack.tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in pack) for pack in packs]
    assert all(0 < total <= capacity for total in sums)
    assert sum(sorted(sums)[:2]) > capacity or len(sums) < 2, "no two packs would fit into one"


def test_the_seed_decides_the_order_of_packs_and_nothing_about_their_number() -> None:
    lengths = alpaca_like(3000)
    once, again, other = (list(map(tuple, pack_rows(lengths, 2048, seed))) for seed in (5, 5, 6))
    assert once == again != other and len(once) == len(other)
    first = [lengths[pack[0]] for pack in once]
    assert first != sorted(first, reverse=True), "packs of long rows do not come first"
    assert all(list(pack) == sorted(pack) for pack in once)
