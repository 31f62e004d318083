"""Data sets on indexed files, their split, and the check against the run that trains on them."""

from pathlib import Path

import numpy as np
import pytest

from mindspeed_llm.data.dataset import IndexedDataset, split_dataset
from mindspeed_llm.data.division import content_hashes, divide, split_shares
from mindspeed_llm.data.indexed_file import IndexedFileWriter
from mindspeed_llm.data.report import check_data_agree, check_data_matches, write_json
from mindspeed_llm.errors import InputError, UsageError


def make(prefix: Path, rows: list[list[int]], fields: tuple[str, ...] = ("input_ids", "labels")) -> Path:
    for field in fields:
        with IndexedFileWriter(Path(f"{prefix}_packed_{field}_document")) as writer:
            for row in rows:
                writer.add(np.array([t + (100 if field == "labels" else 0) for t in row], np.int32), [len(row)])
    return prefix


def test_rows_come_back_by_number_and_name_their_place(tmp_path: Path) -> None:
    prefix = make(tmp_path / "a", [[1, 2], [3], [4, 5, 6]])
    data = IndexedDataset(prefix)
    assert len(data) == 3 and data.lengths.tolist() == [2, 1, 3] and data.reports == [None]
    assert data[2]["input_ids"].tolist() == [4, 5, 6] and data[2]["labels"].tolist() == [104, 105, 106]
    assert data[1]["attention_mask"].tolist() == [1]
    assert data[1]["name"] == f"row 1 of {prefix}"
    with pytest.raises(IndexError):
        data[3]


def test_several_prefixes_are_one_data_set(tmp_path: Path) -> None:
    prefixes = [make(tmp_path / "a", [[1], [2]]), make(tmp_path / "b", [[3]]), make(tmp_path / "c", [[4], [5]])]
    data = IndexedDataset(prefixes)
    assert [data[i]["input_ids"].tolist() for i in range(len(data))] == [[1], [2], [3], [4], [5]]
    assert data[3]["name"] == f"row 0 of {tmp_path / 'c'}"


@pytest.mark.parametrize("ending", ["", "_packed", "_packed_input_ids_document", "_packed_labels_document.idx"])
def test_the_prefix_may_carry_the_files_ending(tmp_path: Path, ending: str) -> None:
    make(tmp_path / "a", [[1, 2]])
    assert len(IndexedDataset(f"{tmp_path / 'a'}{ending}")) == 1


def test_a_prefix_is_literal(tmp_path: Path) -> None:
    make(tmp_path / "a+(1).*[x]", [[1]])
    make(tmp_path / "aa1", [[2], [3]])
    assert len(IndexedDataset(tmp_path / "a+(1).*[x]")) == 1
    with pytest.raises(InputError):
        IndexedDataset(tmp_path / "a*")


def test_missing_data_say_what_is_there(tmp_path: Path) -> None:
    make(tmp_path / "alpaca", [[1]])
    with pytest.raises(InputError, match=r"no data .*alpca_packed.*prefixes there: alpaca"):
        IndexedDataset(tmp_path / "alpca")
    with pytest.raises(InputError, match="folder .* does not exist"):
        IndexedDataset(tmp_path / "no" / "alpaca")
    with pytest.raises(InputError, match="no data: give --data-path"):
        IndexedDataset([])


def test_files_of_different_runs_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "a", [[1, 2], [3]])
    make(tmp_path / "a", [[1, 2]], ("labels",))
    with pytest.raises(InputError, match="input_ids has 2 rows .* labels has 1"):
        IndexedDataset(tmp_path / "a")
    Path(tmp_path / "a_packed_labels_document.idx").unlink()
    with pytest.raises(InputError, match=r"labels_document\.idx is missing"):
        IndexedDataset(tmp_path / "a")


def test_neatly_packed_rows_are_recognised_with_and_without_report(tmp_path: Path) -> None:
    prefix = make(tmp_path / "a", [[1, 1, 2]], ("input_ids", "labels", "attention_mask"))
    assert IndexedDataset(prefix).neat_packed
    write_json(Path(f"{prefix}_report.json"), {"neat_pack": False})
    assert not IndexedDataset(prefix).neat_packed


@pytest.mark.parametrize("split", ["95,5,0", "100,0,0", "8,1,1", "1", "0,0,5", "999,1,0", "1/1", "1,1e-12,1e-12"])
def test_a_split_is_disjoint_and_complete_and_every_share_has_rows(tmp_path: Path, split: str) -> None:
    data = IndexedDataset(make(tmp_path / "a", [[i] * (i % 7 + 1) for i in range(100)]))
    parts = split_dataset(data, split)
    rows = [[int(part[i]["input_ids"][0]) for i in range(len(part))] for part in parts]
    assert sorted(sum(rows, [])) == list(range(100))
    assert [bool(part) for part in rows] == [share > 0 for share in split_shares(split)]
    assert all(part == sorted(part) for part in rows)
    assert [part.lengths.tolist() for part in parts] == [[r % 7 + 1 for r in part] for part in rows]


def test_equal_rows_are_in_one_part_whatever_else_the_data_hold_and_shares_are_met(tmp_path: Path) -> None:
    rows = [[i % 2500, i % 7 * (i % 2500 > 10)] for i in range(5000)]
    data = IndexedDataset([make(tmp_path / "a", rows[:4000]), make(tmp_path / "b", rows[4000:])])
    parts = [{tuple(part[i]["input_ids"]) for i in range(len(part))} for part in split_dataset(data, "80,15,5")]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert set.union(*parts) == set(map(tuple, rows))
    for part, share in zip(parts, (0.8, 0.15, 0.05), strict=True):
        assert abs(len(part) / len(set(map(tuple, rows))) - share) < 0.02
    fewer = split_dataset(IndexedDataset(make(tmp_path / "c", rows[1000:2000])), "80,15,5")
    for part, whole in zip(fewer, parts, strict=True):
        assert {tuple(part[i]["input_ids"]) for i in range(len(part))} <= whole, "a row's part depends on it alone"


def test_training_and_preprocessing_put_a_row_into_the_same_part(tmp_path: Path) -> None:
    rows = [[i, i + 1] for i in range(400)]
    hashes = np.array(content_hashes(np.array(rows).ravel(), [2] * 400), np.uint64)
    train, valid, test = split_dataset(IndexedDataset(make(tmp_path / "a", rows)), "7,2,1")
    for number, part in enumerate((train, valid, test)):
        assert part.rows.tolist() == np.flatnonzero(divide(hashes, "7,2,1") == number).tolist()


def test_a_part_that_no_hash_falls_into_takes_all_rows_of_one_content() -> None:
    hashes = np.array([1, 1, 1, 1 << 60, 1 << 60], np.uint64)
    assert divide(hashes, "50,50,0").tolist() == [0, 0, 0, 1, 1]
    assert divide(np.array([2**64 - 1, 0], np.uint64), "99,1,0").tolist() == [1, 0]
    with pytest.raises(InputError, match="2 different rows cannot be divided into 3 parts"):
        divide(hashes, "1,1,1")


def test_a_split_that_cannot_be_is_refused(tmp_path: Path) -> None:
    data = IndexedDataset(make(tmp_path / "a", [[1], [1]]))
    for split in ("", "a,b", "1,2,3,4", "-1,2,0", "0,0,0"):
        with pytest.raises(UsageError, match="--split"):
            split_dataset(data, split)
    with pytest.raises(InputError, match="1 different rows cannot be divided into 2 parts"):
        split_dataset(data, "95,5,0")


def test_data_of_another_tokenizer_template_or_mode_are_refused_naming_both() -> None:
    report = {
        "tokenizer": {"path": "/models/a", "sha256": "1" * 64},
        "template": {"name": "qwen3", "uses_thinking": True},
        "enable_thinking": "true",
    }
    check_data_matches(report, "1" * 64, "qwen3", "true")
    check_data_matches(report, "1" * 64)
    check_data_matches(None, "2" * 64, "qwen", "false")
    with pytest.raises(InputError, match="/models/a .*111111111111.*222222222222"):
        check_data_matches(report, "2" * 64, "qwen3", "true")
    with pytest.raises(InputError, match="--prompt-type qwen3, the run asks for qwen"):
        check_data_matches(report, "1" * 64, "qwen", "true")
    with pytest.raises(InputError, match="--enable-thinking true, the run asks for none"):
        check_data_matches(report, "1" * 64, "qwen3", "none")
    report["template"]["sha256"] = "3" * 64
    check_data_matches(report, "1" * 64, "qwen3", "true", "3" * 64)
    with pytest.raises(InputError, match="another text of template qwen3 .*333333333333.*444444444444"):
        check_data_matches(report, "1" * 64, "qwen3", "true", "4" * 64)
    report["template"] = {"name": "alpaca", "uses_thinking": False}
    check_data_matches(report, "1" * 64, "alpaca", "none")


def test_data_sets_of_one_run_must_come_from_one_tokenizer_and_one_text_of_one_template() -> None:
    def report(tokenizer: str = "1", name: str = "qwen3", text: str = "a", thinking: str = "none") -> dict:
        template = {"name": name, "sha256": text, "uses_thinking": True}
        return {"tokenizer": {"sha256": tokenizer}, "template": template, "enable_thinking": thinking}

    check_data_agree({"x": report(), "y": None, "z": report(), "w": report(thinking="true")})
    check_data_agree(
        {"text": report(name="empty", text="e"), "x": report(), "more text": report(name="empty", text="e")}
    )
    for other, what in (
        (report("2"), "tokenizer"),
        (report(name="qwen"), "template"),
        (report(text="b"), "content of"),
    ):
        with pytest.raises(InputError, match=f"x and z .*{what}"):
            check_data_agree({"x": report(), "y": None, "z": other})
    with pytest.raises(InputError, match="the data z were made with another text of template qwen3"):
        check_data_matches(report(text="b"), "1", "qwen3", None, "a", "the data z")
    check_data_matches(report(text="a"), "1", "qwen3", None, "a")
