"""Blends of data sets: shares as asked, no row more often than another by more than one, nothing out of place."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from mindspeed_llm.data.blend import BlendedDataset, parse_data_path, shares_of
from mindspeed_llm.errors import InputError, UsageError


class Numbered:
    """A data set whose row i of `name` says so."""

    def __init__(self, name: str, rows: int) -> None:
        self.name = name
        self.lengths = np.arange(1, rows + 1, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": np.zeros(int(self.lengths[row]), np.int32), "name": f"{self.name}{row}"}


def test_every_source_has_its_share_and_its_rows_come_equally_often() -> None:
    blend = BlendedDataset([Numbered("a", 90), Numbered("b", 10), Numbered("c", 20)], [0.5, 0.25, 0.25], seed=3)
    assert len(blend) == 120 and blend.counts.tolist() == [60, 30, 30]
    seen = Counter(blend[i]["name"] for i in range(len(blend)))
    assert Counter(name[0] for name in seen.elements()) == {"a": 60, "b": 30, "c": 30}
    assert set(Counter({n: c for n, c in seen.items() if n[0] == "b"}).values()) == {3}
    assert {c for n, c in seen.items() if n[0] == "c"} == {1, 2} and {c for n, c in seen.items() if n[0] == "a"} == {1}
    assert [len(blend[i]["input_ids"]) for i in range(len(blend))] == blend.lengths.tolist()


def test_the_seed_and_the_pass_draw_the_rows_of_an_incomplete_pass() -> None:
    sources = [Numbered("a", 100), Numbered("b", 100)]
    drawn = [
        {blend[i]["name"] for i in range(len(blend))}
        for blend in (BlendedDataset(sources, [0.3, 0.7], seed, n) for seed, n in ((1, 0), (1, 0), (2, 0), (1, 1)))
    ]
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2] and drawn[0] != drawn[3]


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


def test_an_empty_source_and_missing_weights_are_refused() -> None:
    with pytest.raises(InputError, match="data set 2 of the blend holds no rows"):
        BlendedDataset([Numbered("a", 5), Numbered("b", 0)], [0.5, 0.5], 0)
    with pytest.raises(UsageError, match="2 data sets"):
        BlendedDataset([Numbered("a", 5), Numbered("b", 2)], [1.0], 0)
