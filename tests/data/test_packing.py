"""Greedy packing, against the quadratic definition."""

import random

import pytest

from mindspeed_llm.data.packing import greedy_packs


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
