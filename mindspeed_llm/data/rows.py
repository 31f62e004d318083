"""Rows of a data file or folder, one at a time, each with the place it came from.

json (an array, or one object per line), jsonl, csv and parquet. Files are read piece by piece: memory does not grow
with the file. What cannot be read at all (not UTF-8, broken JSON, a row that is no object) is an `InputError` naming
file and row; what is wrong inside a row is judged by the handler.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_llm.errors import InputError

CHUNK = 1 << 20  # bytes or characters read at once
JSON_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Row:
    """One row: its columns, the file it is from and its number there (from 1; the line number in line files)."""

    file: str
    number: int
    columns: Mapping[str, Any]


def find_files(path: str | Path) -> tuple[list[Path], list[Path]]:
    """The data files under `path` in name order, and the files of a folder that are left aside.

    In a folder the most frequent known extension decides, and only its files are read.

    Raises:
        InputError: nothing there, or nothing of a known format.
    """
    source = Path(path).expanduser()
    if source.is_file():
        _reader(source)
        return [source], []
    if not source.is_dir():
        raise InputError(f"--input {path}: no such file or folder")
    files = sorted(f for f in source.iterdir() if f.is_file() and not f.name.startswith("."))
    frequency = Counter(f.suffix.lower() for f in files if f.suffix.lower() in READERS)
    if not frequency:
        raise InputError(f"--input {path}: the folder holds no {', '.join(READERS)} file")
    chosen = max(sorted(frequency), key=lambda suffix: frequency[suffix])
    used = [f for f in files if f.suffix.lower() == chosen]
    return used, [f for f in files if f not in used]


def read_rows(files: list[Path]) -> Iterator[Row]:
    """The rows of all files in order.

    Raises:
        InputError: a file cannot be read; names the file and the row.
    """
    for file in files:
        reader = _reader(file)
        try:
            for number, columns in reader(file):
                if not isinstance(columns, dict):
                    raise InputError(
                        f"{file}, row {number}: a JSON {_json_type(columns)} instead of an object with named columns"
                    )
                yield Row(str(file), number, columns)
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); convert it first") from error
        except OSError as error:
            raise InputError(f"cannot read {file} ({error.strerror or error})") from error


def file_hash(file: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _reader(file: Path) -> Callable[[Path], Iterator[tuple[int, Any]]]:
    suffix = file.suffix.lower()
    if suffix not in READERS:
        raise InputError(f"{file}: unknown data format {suffix!r}; known are {', '.join(READERS)}")
    return READERS[suffix]


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    """A JSON array, a single object, or one object per line: the first characters tell which."""
    with file.open(encoding="utf-8-sig") as stream:
        head = stream.read(4096).lstrip()
    if head.startswith("["):
        return _read_array(file)
    first_line = head.split("\n", 1)[0]
    if head.startswith("{") and not _parses(first_line) and len(first_line) < 4096:
        return _read_object(file)
    return _read_lines(file)


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _read_object(file: Path) -> Iterator[tuple[int, Any]]:
    """A file that is one JSON object over several lines, or the error of its first line."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError:
        yield from _read_lines(file)
        return
    yield 1, content


def _read_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """One JSON value per line; empty lines are passed over."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.strip():
                continue
            try:
                yield number, json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise InputError(f"{file}, line {number} is not UTF-8 ({error.reason}); convert it first") from error
            except ValueError as error:
                raise InputError(_broken(f"{file}, line {number}", error, raw.decode("utf-8", "replace"))) from error


def _broken(place: str, error: ValueError, text: str) -> str:
    """The line for broken JSON; `text` is what stands there."""
    start = text.strip()[:60]
    return f"{place} is not valid JSON ({error}); it starts {start!r}: repair or complete the file"


def _read_array(file: Path) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array, decoded as they are read."""
    with file.open(encoding="utf-8-sig") as stream:
        text = _Window(stream.read)
        text.skip("[")
        number = 0
        if text.peek() == "]":
            text.skip("]")
        else:
            while True:
                number += 1
                yield number, text.value(f"{file}, row {number}")
                separator = text.peek()
                if separator not in (",", "]"):
                    found = f"{separator!r} follows" if separator else "the file ends"
                    raise InputError(f"{file}: after row {number} {found} where ',' or ']' belongs; complete the file")
                text.skip(separator)
                if separator == "]":
                    break
        if text.peek():
            raise InputError(f"{file}: text follows the end of the array after row {number}")


class _Window:
    """The part of a JSON text that is in memory, read on when a value does not end in it."""

    def __init__(self, read: Callable[[int], str]) -> None:
        self.read = read
        self.text = ""
        self.position = 0
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            self.position = JSON_SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._more():
                return ""

    def skip(self, character: str) -> None:
        """Step over `character`, which `peek` has shown to be next."""
        assert self.peek() == character
        self.position += 1

    def value(self, place: str) -> Any:
        """The next JSON value; `place` names it in errors."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                if self._may_go_on(error) and self._more():
                    continue
                raise InputError(_broken(place, error, self.text[self.position : self.position + 200])) from error
            if end == len(self.text) and self._more():
                continue  # a number may go on in the next block
            self.position = end
            return value

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether the value is merely cut off by the end of what is in memory: the error lies at that end, or is a
        string that has not been closed yet."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16

    def _more(self) -> bool:
        """Read on, at least as much as is kept, so that long values cost no quadratic time; False at the end."""
        rest = self.text[self.position :]
        block = self.read(max(CHUNK, len(rest)))
        self.text, self.position = rest + block, 0
        return bool(block)


def _read_csv(file: Path) -> Iterator[tuple[int, Any]]:
    """Rows under a header line; an empty cell is null. The number counts rows, the header left aside."""
    csv.field_size_limit(1 << 30)  # the default refuses cells above 128 KiB
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        number = 0
        try:
            for number, columns in enumerate(reader, 1):
                cells = [cell for cell in columns.values() if cell is not None]
                if len(cells) != len(columns) or None in columns:
                    raise InputError(f"{file}, row {number} has more or fewer cells than the header has columns")
                yield number, {name: cell if cell else None for name, cell in columns.items()}
        except csv.Error as error:
            raise InputError(f"{file}, row {number + 1} is not valid CSV ({error})") from error


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a parquet file, one record batch in memory at a time."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(
            f"{file}: reading parquet needs pyarrow (pip install pyarrow), or convert it to jsonl"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(file) as source:
            for batch in source.iter_batches(batch_size=1024):
                for columns in batch.to_pylist():
                    number += 1
                    yield number, columns
    except ArrowException as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{file} cannot be read as parquet after row {number} ({first})") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
