"""Rows of a data file or folder, one at a time, each with the place it came from.

What is wrong with one row travels with it as its `fault`, so that the caller can refuse, count or list it; what cannot
be read at all is an `InputError`.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mindspeed_llm.data.readers import CHUNK, FORMATS, Fault, extension, format_of, is_known
from mindspeed_llm.errors import InputError


class Row(NamedTuple):
    """One row.

    Attributes:
        file: where it is from.
        number: its number there (from 1; the line number in line files).
        columns: its content by column; empty where there is a fault.
        fault: why it could not be read, None when it could.
        excerpt: how a row with a fault begins.
        form: name of the row's own handler where it differs from the run's (sources of several formats).
    """

    file: str
    number: int
    columns: Mapping[str, Any]
    fault: str | None = None
    excerpt: str = ""
    form: str | None = None


def find_files(path: str | Path, option: str = "--input") -> tuple[list[Path], list[Path]]:
    """The data files under `path` in name order, and the files of a folder that are left aside.

    In a folder the most frequent known extension decides, and only its files are read; where the folder itself holds
    none, its sub-folders are searched.

    Raises:
        InputError: nothing there, or nothing of a known format; `option` is the flag it names.
    """
    source = Path(path).expanduser()
    if source.is_file():
        format_of(source)
        return [source], []
    if not source.is_dir():
        raise InputError(f"{option} {path}: no such file or folder")
    files = _visible(source.iterdir(), source)
    if not any(is_known(f) for f in files):
        files = _visible(source.rglob("*"), source)
    frequency = Counter(extension(f) for f in files if is_known(f))
    if not frequency:
        raise InputError(f"{option} {path}: the folder holds no {', '.join(FORMATS)} file")
    chosen = max(sorted(frequency), key=lambda suffix: frequency[suffix])
    used = [f for f in files if extension(f) == chosen]
    return used, [f for f in files if f not in used]


def _visible(paths: Iterator[Path], folder: Path) -> list[Path]:
    """The files among `paths`, in order, without hidden ones."""
    return sorted(
        p for p in paths if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )


def read_rows(files: list[Path], wanted: Callable[[int], bool] | None = None) -> Iterator[Row]:
    """The rows of all files in order.

    Args:
        wanted: says of a row's position in the files together (from 0) whether it is to be read; left out, all are.

    Raises:
        InputError: a file cannot be read on; names the file and the row.
    """
    position = -1
    for file in files:
        entries, columns, _ = format_of(file)
        name, number = str(file), 0
        try:
            for number, raw in entries(file):
                position += 1
                if wanted is not None and not wanted(position):
                    continue
                try:
                    yield Row(name, number, columns(raw))
                except Fault as fault:
                    yield Row(name, number, {}, str(fault), fault.excerpt)
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 after row {number} ({error.reason}); convert it first") from error
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            where = f" after row {number}" if number else ""
            raise InputError(f"cannot read {file}{where} ({reason})") from error


def count_rows(files: list[Path]) -> int:
    """Rows of all files, told by reading them without interpreting them.

    Raises:
        InputError: a file cannot be read.
    """
    return sum(map(_count, files))


def _count(file: Path) -> int:
    """Entries of one file."""
    seen = 0

    def pass_over(_: int) -> bool:
        nonlocal seen
        seen += 1
        return False

    for _ in read_rows([file], pass_over):
        pass
    return seen


def estimate_rows(files: list[Path]) -> int | None:
    """About how many rows the files hold, where that can be told quickly; None where it cannot."""
    counts = [format_of(file).count(file) for file in files]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def file_hash(file: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def text_size(value: Any) -> int:
    """Characters of all texts in a value.

    Raises:
        Fault: a text holds half a surrogate pair, which no UTF-8 can express.
    """
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise Fault("text holds half of a surrogate pair, which is no character") from None
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(text_size, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(text_size, value))
    return 0
