"""Where rows come from: `--input`, or several sources in a stated mixture (`--dataset`).

A source is written `path[:subset][#count]`. The path is a file, a folder, the id of a data set on the Hugging Face hub,
or `self-cognition`; a subset is a sub-folder, or the files whose names begin with it; the count draws that many rows by
the seed without replacement, and beyond the source's size repeats whole passes. Everything about the mixture is decided
by row numbers, so that any range of it can be read without the rest.
"""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from mindspeed_llm.data.rows import Row, count_rows, estimate_rows, find_files, read_rows
from mindspeed_llm.data.self_cognition import is_self_cognition
from mindspeed_llm.errors import InputError, UsageError

MIX_STRATEGIES = ("concat", "interleave_under", "interleave_over")
# the part of a data set of the hub that is for training, in the name of a file or folder
TRAINING_PART = re.compile(r"(^|[/._-])train([/._-]|$)", re.IGNORECASE)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Spec:
    """A source as it is written: path, subset and count, the last two None where they are not given."""

    path: str
    subset: str | None = None
    count: int | None = None


def parse_spec(text: str) -> Spec:
    """The parts of `path[:subset][#count]`; what exists under the whole text is taken literally.

    Raises:
        UsageError: a count that is no number above zero.
    """
    if Path(text).expanduser().exists():
        return Spec(text)
    path, mark, count = text.rpartition("#")
    if not mark:
        path = text
    elif not count.isdecimal() or int(count) < 1:
        raise UsageError(f"--dataset {text}: {count!r} after # is no number of rows; write e.g. {path}#500")
    number = int(count) if mark else None
    if Path(path).expanduser().exists():
        return Spec(path, None, number)
    head, mark, subset = path.rpartition(":")
    # a drive letter or a leading colon is no subset
    return Spec(head, subset, number) if len(head) > 1 and subset else Spec(path, None, number)


@dataclass
class Source:
    """Rows of one source, and how many of them take part.

    Attributes:
        name: as it was written.
        files: the files it is read from; empty for rows held in memory.
        unused: files of its folder that are left aside.
        wanted: rows that take part; None for all of them once.
        most: rows that take part at most; None for no such limit.
        seed: draws the rows of an incomplete pass.
        memory: rows that are in no file.
        form: name of the handler its rows need where it is not the run's.
    """

    name: str
    files: list[Path]
    unused: list[Path] = field(default_factory=list)
    wanted: int | None = None
    most: int | None = None
    seed: tuple[int, int] = (0, 0)
    memory: list[Row] = field(default_factory=list)
    form: str | None = None

    @cached_property
    def size(self) -> int:
        """Rows the source has.

        Raises:
            InputError: it has none, or a file cannot be read.
        """
        size = len(self.memory) or count_rows(self.files)
        if not size:
            raise InputError(f"{self.name} holds no rows")
        return size

    @property
    def total(self) -> int:
        """Rows that take part."""
        return self.limited(self.size if self.wanted is None else self.wanted)

    def limited(self, count: int) -> int:
        """A number of rows, or `most` where that is less."""
        return count if self.most is None else min(count, self.most)

    def estimate(self) -> int | None:
        """About how many rows take part, where that can be told without reading them all."""
        count = self.wanted or len(self.memory) or estimate_rows(self.files)
        return None if count is None else self.limited(count)

    def rows(self, begin: int = 0, end: int | None = None) -> Iterator[Row]:
        """The rows that take part, from number `begin` up to `end` of them."""
        if self.wanted is None and self.most is None and begin == 0 and end is None:
            return self.in_order()
        return self._passes(begin, self.total if end is None else end)

    def in_order(self) -> Iterator[Row]:
        """All its rows, whether they take part or not; the first of them come without reading the others."""
        return self._pass(None, None)

    def first(self) -> Row | None:
        """The first row that can be read, None when there is none."""
        return next((row for row in self.in_order() if row.fault is None), None)

    def _passes(self, begin: int, end: int) -> Iterator[Row]:
        """Whole passes through the source, then the drawn rows of an incomplete one, all in the source's order."""
        full, drawn = divmod(self.total, self.size)
        for number in range(full + bool(drawn)):
            length = self.size if number < full else drawn
            start = number * self.size
            first, last = max(begin - start, 0), min(end - start, length)
            if first < last:
                taking = np.zeros(self.size, bool)
                taking[(np.arange(length) if number < full else self._draw(drawn))[first:last]] = True
                yield from self._pass(taking, last - first)

    def _draw(self, count: int) -> np.ndarray:
        """[count] positions drawn without replacement, ascending."""
        random = np.random.default_rng(self.seed)
        return np.sort(random.choice(self.size, count, replace=False, shuffle=False))

    def _pass(self, taking: np.ndarray | None, count: int | None) -> Iterator[Row]:
        """The rows whose position is marked in `taking`, `count` of them; all rows when there is no mark."""
        if self.memory:
            rows = iter(self.memory if taking is None else [self.memory[i] for i in np.flatnonzero(taking)])
        else:
            wanted = None if taking is None else taking.__getitem__
            rows = islice(read_rows(self.files, wanted), count)  # type: ignore[arg-type]
        return rows if self.form is None else (row._replace(form=self.form) for row in rows)


@dataclass
class Mixture:
    """Several sources as one sequence of rows.

    Attributes:
        sources: in the order in which they were given.
        weights: shares of the sources in an interleaved mixture; empty for one source after the other.
        strategy: one of `MIX_STRATEGIES`. `interleave_under` ends when the first source is used up, `interleave_over`
            when all are, the smaller ones being repeated.
        seed: draws which source comes next.
    """

    sources: Sequence[Source]
    weights: Sequence[float] = ()
    strategy: str = "concat"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the shares."""
        if self.strategy == "concat":
            if self.weights:
                raise UsageError("--interleave-probs needs --mix-strategy interleave_under or interleave_over")
            return
        weights = np.array(self.weights or [1.0] * len(self.sources))
        if len(weights) != len(self.sources) or not np.all(np.isfinite(weights)) or np.any(weights <= 0):
            raise UsageError(
                f"--interleave-probs: {len(weights)} values for {len(self.sources)} sources; give one above 0 for each"
            )

    @cached_property
    def parts(self) -> Sequence[Source]:
        """The sources with as many rows as take part of each; interleaving takes one reading to count them."""
        if self.strategy == "concat":
            return self.sources
        counts = self.interleaved([source.total for source in self.sources])
        made = [copy.copy(source) for source in self.sources]  # with the size that has been counted
        for part, count in zip(made, counts, strict=True):
            part.wanted, part.most = count, None
        return made

    def interleaved(self, sizes: Sequence[int]) -> list[int]:
        """Rows of each source in an interleaved mixture, from those that could take part."""
        weights = np.array(self.weights or [1.0] * len(sizes))
        weights = weights / weights.sum()
        under = self.strategy == "interleave_under"
        rows = (np.min if under else np.max)(np.array(sizes) / weights)
        shares = np.maximum(np.rint(rows * weights).astype(int), 1).tolist()
        return list(map(min if under else max, shares, sizes))

    @property
    def files(self) -> list[Path]:
        """The files of all sources, each once."""
        return list(dict.fromkeys(file for source in self.sources for file in source.files))

    @property
    def total(self) -> int:
        """Rows of all sources together; counting them may take one reading."""
        return sum(source.total for source in self.parts)

    def estimates(self) -> list[int] | None:
        """About how many rows take part of each source, where that can be told without reading them all."""
        counts = [count for source in self.sources if (count := source.estimate()) is not None]
        if len(counts) < len(self.sources):
            return None
        return counts if self.strategy == "concat" else self.interleaved(counts)

    def estimate(self) -> int | None:
        """About how many rows there are, likewise."""
        counts = self.estimates()
        return None if counts is None else sum(counts)

    def rows(self, begin: int = 0, end: int | None = None) -> Iterator[Row]:
        """The rows from number `begin` up to `end`."""
        if self.strategy != "concat":
            yield from self._interleaved(begin, self.total if end is None else end)
            return
        start = 0
        for source in self.parts:
            if begin == 0 and end is None:
                yield from source.rows()
                continue
            first, last = max(begin - start, 0), source.total if end is None else min(end - start, source.total)
            if first < last:
                yield from source.rows(first, last)
            start += source.total

    def _interleaved(self, begin: int, end: int) -> Iterator[Row]:
        """The sources' rows in a drawn order: one byte per row says whose turn it is."""
        totals = [source.total for source in self.parts]
        turns = np.repeat(np.arange(len(totals), dtype=np.uint8), totals)
        np.random.default_rng([self.seed, len(totals)]).shuffle(turns)
        before = np.bincount(turns[:begin], minlength=len(totals)).tolist()
        streams = [source.rows(first, None) for source, first in zip(self.parts, before, strict=True)]
        for turn in turns[begin:end].tolist():
            yield next(streams[turn])


def open_source(text: str, seed: tuple[int, int]) -> Source:
    """The source a `--dataset` word names, its files found; `self-cognition` comes without its rows.

    Raises:
        UsageError: the count is wrong.
        InputError: there is no such path, subset or data set.
    """
    spec = parse_spec(text)
    if is_self_cognition(spec.path) and not Path(spec.path).expanduser().exists():
        return Source(text, [], wanted=spec.count, seed=seed)
    path = Path(spec.path).expanduser()
    if path.exists():
        files, unused = subset_files(path, spec.subset, f"--dataset {text}:")
    else:
        files, unused = files_of_hub(spec.path, spec.subset, f"--dataset {text}:")
    return Source(text, files, unused, spec.count, seed=seed)


def files_of_hub(name: str, subset: str | None, place: str) -> tuple[list[Path], list[Path]]:
    """The files of a data set of the hub that are read, and those that are not: of parts named so, train alone.

    Args:
        name: its id, owner/name.
        place: what named it, for errors.

    Raises:
        InputError: the hub does not give it, it has no such subset or holds no data.
    """
    folder = _from_hub(name, place)
    files, unused = subset_files(folder, subset, place)
    training = [file for file in files if TRAINING_PART.search(file.relative_to(folder).as_posix())]
    if not training:
        return files, unused
    return training, [*unused, *(file for file in files if file not in training)]


def subset_files(path: Path, subset: str | None, place: str) -> tuple[list[Path], list[Path]]:
    """The data files of a path, of a folder those of its subset where one is named; and those left aside.

    Raises:
        InputError: there are none; `place` is what it names.
    """
    return _subset(path, subset, place) if subset else find_files(path, place)


def _subset(path: Path, subset: str, place: str) -> tuple[list[Path], list[Path]]:
    """The files of a sub-folder, or those of the folder whose names begin with the subset's."""
    if (path / subset).is_dir():
        return find_files(path / subset, place)
    if path.is_dir():
        files, unused = find_files(path, place)
        begins = [f for f in files if re.match(re.escape(subset) + r"(?![A-Za-z0-9])", f.relative_to(path).as_posix())]
        if begins:
            return begins, [*unused, *(f for f in files if f not in begins)]
    there = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))[:10] if path.is_dir() else []
    raise InputError(f"{place} {path} has no subset {subset!r} (it holds: {', '.join(there) or 'one file'})")


def _from_hub(name: str, place: str) -> Path:
    """Folder of a data set of the hub, downloaded or from the hub's cache."""
    if not HUB_ID.fullmatch(name):
        raise InputError(f"{place} no such file or folder, and {name!r} is no id of the form owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(f"{place} no such file or folder; an id needs huggingface_hub") from error
    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except Exception as error:  # the library raises many kinds; all mean that the data set is not to be had
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{place} no such file or folder, and the hub does not give {name} ({first}); download it and name its "
            "folder"
        ) from error


def detect_form(source: Source) -> tuple[str, str]:
    """(handler name, map keys) that the columns of a source's first row ask for.

    Raises:
        InputError: no row can be read, or its columns are of no known format.
    """
    row = source.first()
    if row is None:
        raise InputError(f"{source.name}: no row can be read")
    columns = row.columns
    if any(mark in str(value) for value in columns.values() for mark in ("{{NAME}}", "{{AUTHOR}}")):
        raise InputError(
            f"{source.name} has places for a name and a maker, which are filled in the built-in source alone: write "
            "--dataset self-cognition, with --model-name and --model-author"
        )
    for column in ("messages", "conversations"):
        turns = columns.get(column)
        if isinstance(turns, list):
            if turns and isinstance(turns[0], dict) and "role" in turns[0]:
                return "OpenAIInstructionHandler", json.dumps({"messages": column} if column != "messages" else {})
            return "SharegptStyleInstructionHandler", json.dumps({"messages": column})
    for prompt, response in (("query", "response"), ("question", "answer"), ("prompt", "response"),
                             ("instruction", "response"), ("prompt", "completion")):  # fmt: skip
        if prompt in columns and response in columns:
            keys = {"prompt": prompt, "query": "input" if "input" in columns else "", "response": response}
            keys |= {key: key for key in ("system", "history") if key in columns}
            return "AlpacaStyleInstructionHandler", json.dumps(keys)
    if "instruction" in columns and "output" in columns:
        keys = {key: key for key in ("system", "history") if key in columns}
        return "AlpacaStyleInstructionHandler", json.dumps(keys)
    if set(columns) == {"text"}:
        return "GeneralPretrainHandler", "{}"
    raise InputError(
        f"{source.name}: the columns {', '.join(map(str, columns))} are of no known format; name one with "
        "--handler-name and --map-keys"
    )
