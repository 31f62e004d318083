"""File formats: the entries of one file, one at a time.

json (an array, or one object per line), jsonl, txt (one text per line), csv, parquet and arrow; the text formats also
compressed by gzip (`.gz`) or zstandard (`.zst`). Files are read piece by piece: memory does not grow with the file.

An entry is what can be had without interpreting it: the bytes of a line, the columns of a table row. `Format.columns`
interprets it, so that entries which are only counted or passed over cost little. What is wrong with one entry is a
`Fault`, after which reading goes on; what makes the rest of a file unreadable is an `InputError`.
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from mindspeed_llm.errors import InputError

CHUNK = 1 << 20  # bytes or characters read at once
COUNTED = 32  # chunks of a file whose lines are counted; of a larger one as many, evenly spread
TABLE_ROWS = 256  # rows of a parquet or arrow batch in memory at a time
CSV_CELL = 1 << 30  # characters of a cell; the csv module's own limit refuses cells above 128 KiB
JSON_SPACE = re.compile(r"[ \t\n\r]*")
COMPRESSED = (".gz", ".zst")

Entry = tuple[int, Any]  # number in the file (from 1; the line's in line files) and the uninterpreted content


class Fault(Exception):
    """One entry is wrong; the text is the reason, alike for all entries wrong in the same way.

    Attributes:
        excerpt: how the entry begins.
    """

    def __init__(self, reason: str, excerpt: str = "") -> None:
        super().__init__(reason)
        self.excerpt = excerpt


class Format(NamedTuple):
    """How files of one extension are read.

    Attributes:
        entries: (file) -> the file's entries. Raises InputError where the rest of the file cannot be read.
        columns: (entry's content) -> its columns. Raises Fault.
        count: (file) -> about how many entries there are, None where only reading them all would tell.
    """

    entries: Callable[[Path], Iterator[Entry]]
    columns: Callable[[Any], dict[str, Any]]
    count: Callable[[Path], int | None]


def format_of(file: Path) -> Format:
    """The format a file's name says.

    Raises:
        InputError: an extension that is not known, or a table format compressed as a whole.
    """
    suffix = extension(file)
    inner = suffix.removesuffix(".gz").removesuffix(".zst")
    if inner not in FORMATS:
        raise InputError(f"{file}: unknown data format {suffix!r}; known are {', '.join(FORMATS)}, text also .gz, .zst")
    if inner != suffix and inner in TABLES:
        raise InputError(f"{file}: {inner} is compressed inside; decompress {suffix} first")
    return FORMATS[inner]


def extension(file: Path) -> str:
    """The extension in lower case, two of them where the last only names a compression: `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] and suffixes[-1] in COMPRESSED else "".join(suffixes[-1:])


def is_known(file: Path) -> bool:
    """Whether a file's extension is that of a data file."""
    try:
        format_of(file)
    except InputError:
        return False
    return True


def open_bytes(file: Path) -> BinaryIO:
    """The bytes of a file, decompressed while they are read."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(file), CHUNK)  # type: ignore[arg-type]
    if suffix == ".zst":
        from pyarrow import input_stream

        return io.BufferedReader(input_stream(str(file), compression="zstd"), CHUNK)
    return file.open("rb")


def _open_text(file: Path, newline: str | None = None) -> TextIO:
    return io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig", newline=newline)


def _unknown_count(file: Path) -> None:
    """Entries of this format can only be counted by reading them."""


def _count_lines(file: Path) -> int | None:
    """Lines of an uncompressed file, empty ones too; about how many in a large one, from pieces; None if compressed."""
    if file.suffix.lower() in COMPRESSED:
        return None
    size = file.stat().st_size
    step, count, seen, last = max(CHUNK, size // COUNTED), 0, 0, b"\n"
    with file.open("rb") as stream:
        for place in range(0, size, step):
            stream.seek(place)
            block = stream.read(CHUNK)
            count, seen, last = count + block.count(b"\n"), seen + len(block), block[-1:]
    if step > CHUNK:
        return round(count * size / seen) or None
    return count + (last != b"\n")


def _lines(file: Path) -> Iterator[Entry]:
    """The lines that are not empty."""
    return (entry for entry in _text_lines(file) if not entry[1].isspace())


def _text_lines(file: Path) -> Iterator[Entry]:
    """The lines that are not empty; in running text white space alone is a text too."""
    with open_bytes(file) as stream:
        for number, raw in enumerate(stream, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.rstrip(b"\r\n"):
                yield number, raw


def _text_of(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        beginning = raw[:200].decode("utf-8", "replace")
        raise Fault(f"not UTF-8 ({error.reason}); convert the file first", beginning) from None


def _json_columns(raw: Any) -> dict[str, Any]:
    """Columns of a JSON line, or of a value that is decoded already."""
    value = raw
    if isinstance(raw, bytes):
        text = _text_of(raw)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Fault(f"not valid JSON ({_what(error)})", text[:200]) from None
    if not isinstance(value, dict):
        beginning = json.dumps(value, ensure_ascii=False)[:200]
        raise Fault(f"a JSON {_json_type(value)} instead of an object with named columns", beginning)
    return value


def _what(error: ValueError | RecursionError) -> str:
    """What is wrong with a JSON text, in words that are alike for all texts wrong in the same way."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _text_columns(raw: bytes) -> dict[str, Any]:
    return {"text": _text_of(raw).rstrip("\r\n")}


def _json_entries(file: Path) -> Iterator[Entry]:
    """A JSON array, a single object, or one object per line: the first characters tell which."""
    kind = _json_kind(file)
    if kind == "array":
        return _array(file)
    return _object(file) if kind == "object" else _lines(file)


def _json_kind(file: Path) -> str:
    """`array`, `object` (one, over several lines) or `lines`."""
    with open_bytes(file) as stream:
        head = stream.read(4096).decode("utf-8-sig", "replace").lstrip()
    if head.startswith("["):
        return "array"
    first_line = head.split("\n", 1)[0]
    several = head.startswith("{") and len(first_line) < 4096 and not _parses(first_line)
    return "object" if several else "lines"


def _count_json(file: Path) -> int | None:
    return _count_lines(file) if _json_kind(file) == "lines" else None


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _object(file: Path) -> Iterator[Entry]:
    """A file that is one JSON object over several lines; where it is not, its lines with their faults."""
    with open_bytes(file) as stream:
        content = stream.read()
    try:
        yield 1, json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        yield from _lines(file)


def _array(file: Path) -> Iterator[Entry]:
    """The elements of a JSON array, decoded as they are read."""
    with _open_text(file) as stream:
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
            except (ValueError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError) and self._may_go_on(error) and self._more():
                    continue
                start = self.text[self.position : self.position + 60]
                raise InputError(
                    f"{place} is not valid JSON ({_what(error)}); it starts {start!r}: repair or complete the file"
                ) from error
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


def _csv_entries(file: Path) -> Iterator[Entry]:
    """Rows under a header line, as (header, cells). The number counts rows, the header left aside."""
    previous = csv.field_size_limit(CSV_CELL)
    number = 0
    try:
        with _open_text(file, newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            if twice := [name for name in header if header.count(name) > 1]:
                raise InputError(f"{file}: the header names column {twice[0]!r} twice; rename one")
            for cells in reader:
                if cells:
                    number += 1
                    yield number, (header, cells)
    except csv.Error as error:
        raise InputError(f"{file}, row {number + 1} is not valid CSV ({error})") from error
    finally:
        csv.field_size_limit(previous)


def _csv_columns(raw: tuple[list[str], list[str]]) -> dict[str, Any]:
    """Columns by the header's names; an empty cell is null."""
    header, cells = raw
    if len(header) != len(cells):
        raise Fault("more or fewer cells than the header has columns", ",".join(cells)[:200])
    return {name: cell if cell else None for name, cell in zip(header, cells, strict=True)}


def _parquet(file: Path) -> Iterator[Entry]:
    """Rows of a parquet file, one record batch in memory at a time."""
    from pyarrow import parquet

    with parquet.ParquetFile(file) as source:
        yield from _numbered(source.iter_batches(batch_size=TABLE_ROWS), file)


def _arrow(file: Path) -> Iterator[Entry]:
    """Rows of an Arrow IPC file or stream, one slice of a record batch as Python values at a time."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            batches: Iterator[Any] = iter(pa.ipc.open_stream(source))
        else:
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        yield from _numbered(
            (batch.slice(at, TABLE_ROWS) for batch in batches for at in range(0, batch.num_rows, TABLE_ROWS)), file
        )


def _numbered(batches: Iterator[Any], file: Path) -> Iterator[Entry]:
    """The rows of record batches, numbered from 1."""
    number = 0
    for batch in batches:
        for columns in batch.to_pylist():
            number += 1
            yield number, columns


def _table(entries: Callable[[Path], Iterator[Entry]]) -> Callable[[Path], Iterator[Entry]]:
    """`entries` of a table format, its library's errors turned into ours."""

    def checked(file: Path) -> Iterator[Entry]:
        try:
            from pyarrow import ArrowException
        except ImportError as error:
            raise InputError(f"{file}: reading it needs pyarrow (pip install pyarrow)") from error
        number = 0
        try:
            for number, columns in entries(file):  # noqa: B007 - counted for the error
                yield number, columns
        except ArrowException as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            kind = extension(file)[1:]
            raise InputError(f"{file} cannot be read as {kind} after row {number} ({first})") from error

    return checked


def _count_parquet(file: Path) -> int | None:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_metadata(file).num_rows
    except ArrowException:
        return None  # reading it says what is wrong


def _same(columns: dict[str, Any]) -> dict[str, Any]:
    return columns


FORMATS: dict[str, Format] = {
    ".json": Format(_json_entries, _json_columns, _count_json),
    ".jsonl": Format(_lines, _json_columns, _count_lines),
    ".csv": Format(_csv_entries, _csv_columns, _unknown_count),
    ".txt": Format(_text_lines, _text_columns, _count_lines),
    ".parquet": Format(_table(_parquet), _same, _count_parquet),
    ".arrow": Format(_table(_arrow), _same, _unknown_count),
}
TABLES = (".parquet", ".arrow")
