"""Rows out of files: every format gives the same rows, and what is broken is named with its place."""

import json
from pathlib import Path

import pytest

from mindspeed_llm.data import rows as rows_module
from mindspeed_llm.data.rows import file_hash, find_files, read_rows
from mindspeed_llm.errors import InputError

ROWS = [
    {"instruction": "问 [1]", "input": "", "output": 'a "quoted"\nline'},
    {"instruction": "x,y", "input": "{[", "output": "b" * 300},
    {"instruction": "emoji 🙂", "input": "\\", "output": "c"},
]


def read(path: Path) -> list[dict]:
    return [dict(row.columns) for row in read_rows(find_files(path)[0])]


def write_jsonl(file: Path, rows: list = ROWS) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def test_json_array_lines_single_object_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8")
    write_jsonl(tmp_path / "lines.json")
    write_jsonl(tmp_path / "b.jsonl")
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    for name in ("a.json", "lines.json", "b.jsonl", "c.parquet"):
        assert read(tmp_path / name) == ROWS, name
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=2))
    assert read(tmp_path / "one.json") == ROWS[:1]


def test_csv_gives_text_and_null_for_empty_cells(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('instruction,input,output\n"x, ""y""",,"two\nlines"\n', encoding="utf-8")
    assert read(tmp_path / "a.csv") == [{"instruction": 'x, "y"', "input": None, "output": "two\nlines"}]


def test_a_byte_order_mark_crlf_and_empty_lines_do_no_harm(tmp_path: Path) -> None:
    text = "\ufeff" + "".join(json.dumps(row) + "\r\n\r\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    assert read(tmp_path / "a.jsonl") == ROWS
    (tmp_path / "b.json").write_bytes(("\ufeff" + json.dumps(ROWS)).encode())
    assert read(tmp_path / "b.json") == ROWS


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_an_array_is_read_alike_whatever_the_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    values = [*ROWS, {"n": 12345, "nested": [1, [2.5e3, None, True], {"k": "v"}]}]
    (tmp_path / "a.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    monkeypatch.setattr(rows_module, "CHUNK", block)
    assert read(tmp_path / "a.json") == values
    assert file_hash(tmp_path / "a.json") == file_hash(tmp_path / "a.json")


def test_a_folder_is_read_in_name_order_by_its_most_frequent_format(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "2.jsonl", ROWS[1:])
    write_jsonl(tmp_path / "1.jsonl", ROWS[:1])
    (tmp_path / "z.csv").write_text("a\n1\n")
    (tmp_path / "README.md").write_text("hi")
    used, unused = find_files(tmp_path)
    assert [f.name for f in used] == ["1.jsonl", "2.jsonl"] and [f.name for f in unused] == ["README.md", "z.csv"]
    assert [(Path(row.file).name, row.number) for row in read_rows(used)] == [
        ("1.jsonl", 1), ("2.jsonl", 1), ("2.jsonl", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "mentions"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2}\n{"a": ', r"a\.jsonl, line 3 is not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1, 2]\n', r"a\.jsonl, row 2: a JSON array instead of an object"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"line 2 is not UTF-8"),
        ("a.json", b'[{"a": 1}, {"a": "unclosed', r"a\.json, row 2 is not valid JSON"),
        ("a.json", b'[{"a": 1}, {"a": 2}', r"after row 2 the file ends"),
        ("a.json", b'[{"a": 1} {"a": 2}]', r"after row 1 '\{' follows"),
        ("a.json", b'[{"a": 1}] tail', r"text follows the end of the array after row 1"),
        ("a.json", b'[{"a": 1}, {"a": tru}, {"b": "' + b"x" * 100 + b'"}]', r"row 2 is not valid JSON"),
        ("a.json", b'["text"]', r"row 1: a JSON string"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv, row 2 has more or fewer cells"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv, row 1 has more or fewer cells"),
        ("a.parquet", b"PAR1 but not really PAR1", r"a\.parquet cannot be read as parquet"),
        ("a.xyz", b"", r"unknown data format '\.xyz'"),
    ],
)
def test_what_cannot_be_read_is_named_with_file_and_row(
    tmp_path: Path, name: str, content: bytes, mentions: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=mentions):
        read(tmp_path / name)


def test_a_missing_input_and_a_folder_without_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        find_files(tmp_path / "nowhere.json")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(InputError, match=r"holds no \.json"):
        find_files(tmp_path)
