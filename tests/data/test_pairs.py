"""Pairs of answers: read from the files of a pairwise handler, laid out as micro-batches."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mindspeed_llm.arguments.data import DataOptions
from mindspeed_llm.data.batch import collate, collate_flat
from mindspeed_llm.data.dataset import IndexedDataset, split_dataset
from mindspeed_llm.data.indexed_file import IndexedFileWriter
from mindspeed_llm.data.pairs import PairDataset, in_pairs
from mindspeed_llm.data.prefixes import open_parts
from mindspeed_llm.errors import InputError

PAIRS = [([1, 2, 3], [1, 2, 4, 5, 6]), ([7, 8], [7, 9]), ([1, 5, 5, 5], [1, 6])]  # the prompt is the first token


def make(prefix: Path, pairs: list[tuple[list[int], list[int]]]) -> Path:
    for number, side in enumerate(("chosen", "rejected")):
        for field, shown in (("input_ids", 1), ("labels", 0)):
            with IndexedFileWriter(Path(f"{prefix}_packed_{side}_{field}_document")) as writer:
                for pair in pairs:
                    ids = pair[number]
                    writer.add(np.array(ids if shown else [-100, *ids[1:]], np.int32), [len(ids)])
    return prefix


def test_pairs_come_back_by_number_as_long_as_their_longer_side(tmp_path: Path) -> None:
    data = PairDataset([make(tmp_path / "a", PAIRS[:2]), make(tmp_path / "b", PAIRS[2:])])
    assert data.lengths.tolist() == [5, 2, 4] and data.sizes == [2, 1]
    pair = data[2]
    assert pair["chosen"]["input_ids"].tolist() == [1, 5, 5, 5] and pair["rejected"]["labels"].tolist() == [-100, 6]
    assert pair["name"] == f"row 0 of {tmp_path / 'b'}"
    assert pair["rejected"]["name"] == f"the rejected answer of row 0 of {tmp_path / 'b'}"
    assert not data.neat_packed and not data.may_be_packed


def test_a_padded_micro_batch_has_the_chosen_answers_before_the_rejected_ones(tmp_path: Path) -> None:
    data = PairDataset(make(tmp_path / "a", PAIRS))
    batch = in_pairs(partial(collate, pad_id=0, seq_length=9, pad_to_longest=True))([data[0], data[1]])
    assert batch["pairs"] == 2
    assert batch["tokens"].tolist() == [[1, 2, 3, 0, 0], [7, 8, 0, 0, 0], [1, 2, 4, 5, 6], [7, 9, 0, 0, 0]]
    assert batch["labels"][2].tolist() == [2, 4, 5, 6, -100]
    assert batch["sequences"].tolist() == [[0] * 5, [1] * 5, [2] * 5, [3] * 5]


def test_a_flat_micro_batch_numbers_its_sequences_and_the_filling_behind_them(tmp_path: Path) -> None:
    data = PairDataset(make(tmp_path / "a", PAIRS))
    batch = in_pairs(partial(collate_flat, pad_id=0, seq_length=9, pad_to_multiple_of=4))([data[1], data[2]])
    assert batch["tokens"].tolist() == [[7, 8, 1, 5, 5, 5, 7, 9, 1, 6, 0, 0]]
    assert batch["sequences"].tolist() == [[0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4]]
    assert batch["cu_seqlens"].tolist() == [0, 2, 6, 8, 10, 12]


def test_both_sides_of_a_pair_are_in_one_part_of_a_split(tmp_path: Path) -> None:
    pairs = [([n, n + 1], [n, n + 2, n + 3]) for n in range(200)]
    parts = split_dataset(PairDataset(make(tmp_path / "a", pairs)), "80,10,10")
    seen = [(pair["chosen"]["input_ids"].tolist(), pair["rejected"]["input_ids"].tolist()) for p in parts for pair in p]
    assert sorted(seen) == pairs and all(len(part) for part in parts)


def test_other_files_than_the_wanted_ones_are_refused_by_name(tmp_path: Path) -> None:
    make(tmp_path / "pairs", PAIRS)
    with pytest.raises(InputError, match=r"pairs holds pairs of answers, which --stage dpo reads.*--stage sft reads"):
        IndexedDataset(tmp_path / "pairs")
    for field in ("input_ids", "labels"):
        with IndexedFileWriter(tmp_path / f"rows_packed_{field}_document") as writer:
            writer.add(np.array([1, 2], np.int32), [2])
    with pytest.raises(InputError, match=r"rows holds rows with answers.*AlpacaStylePairwiseHandler"):
        open_parts(DataOptions(data_path=[str(tmp_path / "rows")]), PairDataset)
    with pytest.raises(InputError, match=r"no data .*_packed_chosen_input_ids.*prefixes there: pairs"):
        PairDataset(tmp_path / "pears")


def test_sides_of_different_runs_are_refused(tmp_path: Path) -> None:
    prefix = make(tmp_path / "a", PAIRS)
    for field in ("input_ids", "labels"):
        with IndexedFileWriter(Path(f"{prefix}_packed_rejected_{field}_document")) as writer:
            writer.add(np.array([1, 2], np.int32), [2])
    with pytest.raises(InputError, match="3 chosen answers and 1 rejected ones"):
        PairDataset(prefix)
    with IndexedFileWriter(Path(f"{prefix}_packed_rejected_labels_document")) as writer:
        writer.add(np.array([1], np.int32), [1])
    with pytest.raises(InputError, match="rejected_input_ids has 1 rows of 2 tokens, rejected_labels has 1 of 1"):
        PairDataset(prefix)


@pytest.mark.parametrize("ending", ["", "_packed", "_packed_rejected_labels_document.bin"])
def test_the_prefix_of_pairs_may_carry_the_files_ending(tmp_path: Path, ending: str) -> None:
    make(tmp_path / "a", PAIRS)
    assert len(PairDataset(f"{tmp_path / 'a'}{ending}")) == 3
