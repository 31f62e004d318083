"""How rows one behind the other are cut over processes: nothing is lost, all have as much to do, rows see themselves.

The truth is one softmax over the whole sequence under a block-diagonal causal mask.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mindspeed_llm.device.kernels import sdpa
from mindspeed_llm.models.context import Cut, parts_of, zigzag, zigzag_rows

CPU = torch.device("cpu")
ROWS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


def filled(lengths: list[int], size: int) -> list[int]:
    """The rows, and a filling behind them that makes them divide."""
    filling = -sum(lengths) % (2 * size)
    return lengths + ([filling] if filling else [])


def positions(cut: Cut, rank: int) -> torch.Tensor:
    """Positions of a process, in its order."""
    return cut.own(torch.arange(sum(end - begin for runs in cut.runs for begin, end in runs)), 0, rank)


def tokens_seen(lengths: list[int], cut: Cut) -> list[int]:
    """Keys that the queries of each process see, all added up: the attention's work."""
    seen = torch.cat([torch.arange(1, length + 1) for length in lengths])
    return [int(seen[positions(cut, rank)].sum()) for rank in range(len(cut.runs))]


@settings(deadline=None, max_examples=60)
@given(ROWS, st.integers(2, 4))
@example([14, 9], 2)
@example([1, 1, 1], 4)
def test_every_position_is_in_one_process_all_have_as_many_and_gathered_ones_come_back_in_order(
    lengths: list[int], size: int
) -> None:
    rows = filled(lengths, size)
    cut = zigzag_rows(rows, size)
    own = [positions(cut, rank) for rank in range(size)]
    assert {len(one) for one in own} == {sum(rows) // size}
    whole = torch.arange(sum(rows))
    assert torch.equal(torch.cat(own).sort().values, whole)
    assert torch.equal(cut.in_order(torch.cat(own)), whole)
    assert torch.equal(cut.by_process(whole), torch.cat(own))


@settings(deadline=None, max_examples=40)
@given(ROWS, st.integers(2, 4), st.sampled_from([None, 5]))
def test_the_parts_of_all_processes_are_attention_within_rows(
    lengths: list[int], size: int, window: int | None
) -> None:
    rows = filled(lengths, size)
    total, cut = sum(rows), zigzag_rows(rows, size)
    torch.manual_seed(total)
    query, key, value = (torch.randn(1, 2, total, 8, dtype=torch.float64) for _ in range(3))
    number = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    place, features = torch.arange(total), {"causal": True, "scale": 0.3, "window": window}
    distance = place[:, None] - place
    visible = (number[:, None] == number) & (distance >= 0) & (distance < (window or total))
    truth = (query @ key.mT * 0.3).masked_fill(~visible, -torch.inf).softmax(-1) @ value
    for rank in range(size):
        mine = positions(cut, rank)
        for part in parts_of(cut.runs[rank], rows, CPU):
            seen = slice(*part.keys)
            asked = mine[slice(*part.queries)]
            found = sdpa(query[:, :, asked], key[:, :, seen], value[:, :, seen], segments=part.segments, **features)
            torch.testing.assert_close(found, truth[:, :, asked], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(
    "rows",
    [[16384], [8192, *[128] * 64], [*[128] * 64, 8192], [5000, 1384, 3000, 3000, 2000, 2000]],
    ids=["one row", "a long row first", "a long row last", "rows of many lengths"],
)
def test_processes_have_alike_much_attention(rows: list[int], size: int) -> None:
    work = tokens_seen(rows, zigzag_rows(rows, size))
    assert max(work) <= 1.02 * min(work)


def test_the_same_rows_cut_as_one_sequence_would_be_lopsided() -> None:
    rows = [8192, *[128] * 64]
    work = tokens_seen(rows, zigzag(sum(rows), 2))
    assert max(work) > 2 * min(work)


def test_a_sequence_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a sequence of 10 cannot be cut into 2 x 2 pieces"):
        zigzag_rows([7, 3], 2)
