"""Rows out of files: every format gives the same rows, and what is broken is named with its place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_llm.data import readers
from mindspeed_llm.data.readers import Fault
from mindspeed_llm.data.rows import count_rows, estimate_rows, file_hash, find_files, read_rows, text_size
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
    monkeypatch.setattr(readers, "CHUNK", block)
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
        ("a.json", b'[{"a": 1}, {"a": "unclosed', r"a\.json, row 2 is not valid JSON"),
        ("a.json", b'[{"a": 1}, {"a": 2}', r"after row 2 the file ends"),
        ("a.json", b'[{"a": 1} {"a": 2}]', r"after row 1 '\{' follows"),
        ("a.json", b'[{"a": 1}] tail', r"text follows the end of the array after row 1"),
        ("a.json", b'[{"a": 1}, {"a": tru}, {"b": "' + b"x" * 100 + b'"}]', r"row 2 is not valid JSON"),
        ("a.json", b'[{"a": 1}, {"a": "\xff"}]', "a\\.json is not UTF-8 after row 0"),
        (
            "a.json",
            b'[{"a": 1}, {"a": ' + b"9" * 5000 + b"}]",
            r"row 2 is not valid JSON \(a number has too many digits",
        ),
        ("a.json", b'[{"a": 1}, ' + b"[" * 100_000, r"row 2 is not valid JSON \(nested too deeply\)"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"a\.csv: the header names column 'a' twice"),
        ("a.csv", b"a,b\n" + b"1,2\n" * 9000 + b"\xff,2\n", r"a\.csv is not UTF-8 after row [1-9]\d\d\d"),
        ("a.csv", b'a,b\n1,"2\n', r"a\.csv, row 1 is not valid CSV"),
        ("a.arrow", b"ARROW1 but not really", r"a\.arrow cannot be read as arrow"),
        ("a.jsonl.gz", b"not gzip", r"cannot read .*a\.jsonl\.gz"),
        ("a.jsonl.zst", b"not zstandard", r"cannot read .*a\.jsonl\.zst"),
        ("a.parquet.gz", b"", r"decompress \.parquet\.gz first"),
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


@pytest.mark.parametrize(
    ("name", "content", "number", "fault"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2}\n{"a": \n{"a": 4}', 3, "not valid JSON (Expecting value)"),
        ("a.jsonl", b'{"a": 1}\r\n[1, 2]\r\n{"a": 2}', 2, "a JSON array instead of an object with named columns"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', 2, "not UTF-8 (invalid start byte); convert the file first"),
        ("a.jsonl", b"[" * 100_000, 1, "not valid JSON (nested too deeply)"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", 1, "not valid JSON (a number has too many digits)"),
        ("a.json", b'["text", {"a": 1}]', 1, "a JSON string instead of an object with named columns"),
        ("a.csv", b"a,b\n1,2\n3\n", 2, "more or fewer cells than the header has columns"),
        ("a.csv", b"a,b\n1,2,3\n", 1, "more or fewer cells than the header has columns"),
        ("a.txt", b"good\n\xffbad\n", 2, "not UTF-8 (invalid start byte); convert the file first"),
    ],
)
def test_a_broken_row_comes_with_its_fault_and_the_others_are_read(
    tmp_path: Path, name: str, content: bytes, number: int, fault: str
) -> None:
    (tmp_path / name).write_bytes(content)
    rows = list(read_rows(find_files(tmp_path / name)[0]))
    assert [(row.number, row.fault) for row in rows if row.fault] == [(number, fault)]
    assert all(row.columns for row in rows if not row.fault)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_text_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    import gzip

    import pyarrow as pa

    plain = {"a.jsonl": write_jsonl(tmp_path / "a.jsonl").read_bytes(), "b.json": json.dumps(ROWS).encode(),
             "c.csv": b"instruction,output\r\nx,y\r\n"}  # fmt: skip
    for name, content in plain.items():
        (tmp_path / name).write_bytes(content)
        packed = gzip.compress(content) if kind == "gz" else pa.compress(content, codec="zstd", asbytes=True)
        (tmp_path / f"{name}.{kind}").write_bytes(packed)
        assert read(tmp_path / f"{name}.{kind}") == read(tmp_path / name), name


def test_arrow_files_and_streams_and_nested_parquet_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a"}], "n": i}
            for i in range(700)]  # fmt: skip
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as sink:
        sink.write_table(table, max_chunksize=400)
    with pa.ipc.new_stream(str(tmp_path / "c.arrow"), table.schema) as sink:
        sink.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert read(tmp_path / name) == rows, name
        assert count_rows([tmp_path / name]) == 700


def test_an_array_of_300_megabytes_is_read_in_a_few(tmp_path: Path) -> None:
    row, small = json.dumps({"text": "x" * 1_000_000}), json.dumps({"text": "y", "n": [1, {"k": None}]})
    with (tmp_path / "a.json").open("w") as stream:
        stream.write("[" + small)
        for _ in range(300):
            stream.write(",\n" + row + ",\n" + small)
        stream.write("]")
    code = (
        "import sys; from pathlib import Path; from mindspeed_llm.data.rows import read_rows;"
        "print(sum(1 for row in read_rows([Path(sys.argv[1])])), Path('/proc/self/status').read_text())"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], capture_output=True, text=True)
    rows, *status = found.stdout.split()
    assert int(rows) == 601, found.stderr
    assert int(status[status.index("VmHWM:") + 1]) < 100 * 1024, "KiB at the peak, the interpreter's own among them"


def test_a_text_file_is_one_row_per_line_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufefffirst  \r\n\r\n 二\nlast".encode())
    assert read(tmp_path / "a.txt") == [{"text": "first  "}, {"text": " 二"}, {"text": "last"}]


def test_rows_are_counted_without_being_interpreted_and_read_by_position(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "c.csv").write_text('x,y\n"1\n",2\n3,4\n')
    files = [tmp_path / name for name in ("a.jsonl", "b.json", "c.csv")]
    assert count_rows(files) == 8 and estimate_rows(files) is None and estimate_rows(files[:1]) == 3
    assert [(Path(row.file).name, row.number) for row in read_rows(files, {2, 3, 7}.__contains__)] == [
        ("a.jsonl", 3), ("b.json", 1), ("c.csv", 2),
    ]  # fmt: skip


def test_sub_folders_are_searched_only_when_the_folder_itself_holds_no_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / ".cache").mkdir()
    write_jsonl(tmp_path / "data" / "1.jsonl")
    write_jsonl(tmp_path / ".cache" / "2.jsonl")
    assert find_files(tmp_path)[0] == [tmp_path / "data" / "1.jsonl"]
    write_jsonl(tmp_path / "0.jsonl")
    assert find_files(tmp_path)[0] == [tmp_path / "0.jsonl"]


def test_the_size_of_a_row_is_its_text_and_half_characters_are_faults() -> None:
    assert text_size({"a": "xy", "b": [{"c": "文"}, ("z",)], "d": 5, "e": None}) == 4
    with pytest.raises(Fault, match="surrogate"):
        text_size({"a": ["ok", "\ud83d"]})


def test_a_missing_input_and_a_folder_without_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        find_files(tmp_path / "nowhere.json")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(InputError, match=r"holds no \.json"):
        find_files(tmp_path)
