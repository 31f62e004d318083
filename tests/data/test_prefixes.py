"""Which prepared files a run reads: joined, weighted, divided by a split, divided by preprocessing, or named apart."""

from pathlib import Path

import numpy as np
import pytest

from mindspeed_llm.arguments.data import DataOptions
from mindspeed_llm.data.prefixes import Part, open_parts
from mindspeed_llm.errors import InputError, UsageError
from tests.data.test_dataset import make


def tokens(part: Part | None) -> list[int]:
    """The first token of every row of a part, which names the row."""
    return [] if part is None else [int(part.source[n]["input_ids"][0]) for n in range(len(part.source))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path / "a", [[n] for n in range(20)])
    make(tmp_path / "b", [[100 + n] for n in range(10)])
    for part, rows in (("train", 8), ("valid", 3), ("test", 0)):
        make(tmp_path / f"c_{part}", [[200 + 20 * len(part) + n] for n in range(rows)])
    return tmp_path


def words(folder: Path, *names: object) -> list[str]:
    return [str(folder / name) if isinstance(name, str) else str(name) for name in names]


def test_prefixes_alone_are_joined_and_weights_blend_them(folder: Path) -> None:
    joined = open_parts(DataOptions(data_path=words(folder, "a", "b")))
    assert tokens(joined.train) == [*range(20), *range(100, 110)] and joined.train.blend(1, True) is None
    assert joined.valid is joined.test is None and not joined.notes
    blended = open_parts(DataOptions(data_path=words(folder, 1, "a", 3, "b")))
    blend = blended.train.blend(1, True)
    assert blend is not None and blend.sizes == [20, 10] and blend.weights == [0.25, 0.75]
    drawn = np.array(tokens(blended.train))[blend.rows(0)]
    assert 7 <= (drawn < 100).sum() <= 8 and len(drawn) == 30


def test_a_split_divides_every_data_set_and_blends_what_is_left_to_train_on(folder: Path) -> None:
    parts = open_parts(DataOptions(data_path=words(folder, 1, "a", 3, "b"), split="80,10,10"))
    assert parts.valid and parts.test and not parts.valid.weights, "what is held out is read once, whole"
    assert parts.train.sizes == [sum(t < 100 for t in tokens(parts.train)), sum(t >= 100 for t in tokens(parts.train))]
    everything = tokens(parts.train) + tokens(parts.valid) + tokens(parts.test)
    assert sorted(everything) == [*range(20), *range(100, 110)]


def test_a_prefix_that_preprocessing_has_divided_stands_for_its_parts_and_that_is_said(folder: Path) -> None:
    parts = open_parts(DataOptions(data_path=words(folder, "c", "b")))
    assert tokens(parts.train) == [*range(300, 308), *range(100, 110)]
    assert tokens(parts.valid) == [300, 301, 302] and parts.test is None
    assert "found c_train c_valid c_test" in parts.notes[0] and "no row for test" in parts.notes[1]
    with pytest.raises(UsageError, match="--split 90,10,0: .*c is divided already"):
        open_parts(DataOptions(data_path=words(folder, "c"), split="90,10,0"))


def test_each_purpose_may_have_its_own_prefixes(folder: Path) -> None:
    options = DataOptions(train_data_path=words(folder, 1, "a", 2, "b"), valid_data_path=words(folder, "c_valid", "b"))
    parts = open_parts(options)
    assert parts.train.weights == [1 / 3, 2 / 3] and tokens(parts.valid) == [300, 301, 302, *range(100, 110)]
    assert parts.test is None and len(parts.fingerprint) == 2
    for wrong, said in (
        (DataOptions(data_path=["x"], train_data_path=["y"]), "--data-path and --train-data-path"),
        (DataOptions(data_path=["x"], valid_data_path=["y"]), "--valid-data-path needs --train-data-path"),
        (DataOptions(train_data_path=["y"], split="9,1"), "--split 9,1"),
        (DataOptions(length_grouping=True), "--length-grouping needs --no-pad"),
        (DataOptions(length_grouping=True, no_pad_to_seq_lengths=True, no_shuffle=True), "--no-shuffle"),
    ):
        with pytest.raises(UsageError, match=said):
            wrong.check()


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(UsageError, match="--data-path is missing"):
        open_parts(DataOptions())
    with pytest.raises(InputError, match="no data .*nowhere_packed"):
        open_parts(DataOptions(data_path=words(folder, "a", "nowhere")))
    with pytest.raises(UsageError, match="--valid-data-path 1 x y"):
        open_parts(DataOptions(train_data_path=words(folder, "a"), valid_data_path=["1", "x", "y"]))
