"""The training side of indexed files: rows by number, several files as one data set, a validation split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mindspeed_llm.data.division import divide, hash_rows, split_shares
from mindspeed_llm.data.indexed_file import IndexedFile
from mindspeed_llm.data.report import read_report
from mindspeed_llm.errors import InputError

REQUIRED_FIELDS = ("input_ids", "labels")
Sample = dict[str, Any]


class RowSource(Protocol):
    """Rows by number.

    A row is a dict: `input_ids`, `labels` and `attention_mask` [length] int, `labels` unshifted with -100 where
    nothing is trained, and `name`, which says in errors where the row stands.
    """

    lengths: np.ndarray  # [rows] int32, tokens of each row

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, row: int) -> Sample:
        """One row."""


class IndexedDataset:
    """The rows of one or more output prefixes of preprocessing, one prefix after the other, read when asked for.

    Attributes:
        prefixes: as given.
        reports: `<prefix>_report.json` of each prefix; None for data made by other programs.
        lengths: [rows] int32.
    """

    def __init__(self, prefixes: str | Path | Sequence[str | Path]) -> None:
        """Open the files of `<prefix>_packed_*_document`; a prefix is taken literally.

        Raises:
            InputError: files missing, truncated, or of different numbers of rows.
        """
        listed = [prefixes] if isinstance(prefixes, (str, Path)) else list(prefixes)
        if not listed:
            raise InputError("no data: give --data-path the output prefix of preprocess_data.py")
        self.prefixes = [Path(prefix).expanduser() for prefix in listed]
        self._parts = [_open_fields(prefix) for prefix in self.prefixes]
        self.reports = [read_report(prefix) for prefix in self.prefixes]
        self.lengths = np.concatenate([part["input_ids"].lengths for part in self._parts])
        self._ends = np.cumsum([len(part["input_ids"]) for part in self._parts])

    @property
    def sizes(self) -> list[int]:
        """Rows of each prefix."""
        return [len(part["input_ids"]) for part in self._parts]

    @property
    def neat_packed(self) -> bool:
        """Whether a row holds several samples that must not see each other (`--neat-pack`)."""
        if all(report is not None for report in self.reports):
            return any(report["neat_pack"] for report in self.reports if report)
        masks = [part["attention_mask"] for part in self._parts if "attention_mask" in part]
        return any(len(mask) > 0 and int(mask[0].max(initial=0)) > 1 for mask in masks)

    def content_hashes(self) -> np.ndarray:
        """[rows] uint64, a hash of each row's tokens; every token is read once."""
        return np.concatenate([hash_rows(part["input_ids"].prefix) for part in self._parts])

    @property
    def may_be_packed(self) -> bool:
        """Whether a row may hold several texts: made with `--pack`, or by a program that left no report."""
        return any(report is None or report.get("pack", True) for report in self.reports)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Sample:
        """Row `row`: read-only arrays on the mapped files, and its name for errors."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = int(np.searchsorted(self._ends, row, side="right"))
        number = row - (int(self._ends[part - 1]) if part else 0)
        files = self._parts[part]
        sample: Sample = {field: file[number] for field, file in files.items()}
        if "attention_mask" not in sample:
            sample["attention_mask"] = np.ones(len(sample["input_ids"]), np.int32)
        sample["name"] = f"row {number} of {self.prefixes[part]}"
        return sample


class Subset:
    """Some rows of a data set, in a given order."""

    def __init__(self, source: RowSource, rows: np.ndarray) -> None:
        """Args: rows: [n] int64, numbers of the rows."""
        self.source = source
        self.rows = rows
        self.lengths = np.asarray(source.lengths)[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        """Row `row` of the subset."""
        return self.source[int(self.rows[row])]


def split_dataset(data: IndexedDataset, split: str) -> tuple[Subset, Subset, Subset]:
    """Training, validation and test part of the rows, disjoint and together all of them, each in the rows' order.

    A row's part follows from its tokens alone, as it does in `preprocess_data.py --split`: equal rows are in one part.

    Args:
        data: rows to divide.
        split: up to three shares, e.g. "95,5,0"; they need not sum to 100. A share above zero gets at least one row.

    Raises:
        UsageError: the shares cannot be read.
        InputError: fewer different rows than parts.
    """
    if sum(share > 0 for share in split_shares(split)) == 1:  # nothing to divide, so nothing to read
        part_of = np.full(len(data), np.argmax(split_shares(split)), np.uint8)
    else:
        part_of = divide(data.content_hashes(), split)
    train, valid, test = (Subset(data, np.flatnonzero(part_of == part)) for part in range(3))
    return train, valid, test


def _open_fields(prefix: Path) -> dict[str, IndexedFile]:
    """The indexed files of a prefix by field, checked to belong together."""
    base = find_base(prefix)
    if base is None:
        raise _missing(prefix)
    fields = {}
    for field in (*REQUIRED_FIELDS, "attention_mask"):
        file = Path(f"{base}_{field}_document")
        if field in REQUIRED_FIELDS or Path(f"{file}.idx").exists() or Path(f"{file}.bin").exists():
            fields[field] = IndexedFile(file)
    first = fields["input_ids"]
    for field, file in fields.items():
        if len(file) != len(first) or not np.array_equal(file.lengths, first.lengths):
            raise InputError(
                f"{prefix}: input_ids has {len(first)} rows of {int(first.lengths.sum())} tokens, {field} has "
                f"{len(file)} of {int(file.lengths.sum())}; they are from different runs, preprocess again"
            )
    return fields


def find_base(prefix: Path) -> Path | None:
    """`<prefix>_packed`, also when the prefix was given with that ending or as one of its files; None without files."""
    name = prefix.name
    for kind in (".bin", ".idx"):
        name = name.removesuffix(kind)
    for field in ("input_ids", "attention_mask", "labels"):
        name = name.removesuffix(f"_{field}_document")
    for base in (f"{name}_packed", name):
        if any((prefix.parent / f"{base}_{field}_document.idx").exists() for field in REQUIRED_FIELDS):
            return prefix.parent / base
    return None


def _missing(prefix: Path) -> InputError:
    """The error for a prefix without files, naming those that there are."""
    if not prefix.parent.is_dir():
        return InputError(f"no data {prefix}: the folder {prefix.parent} does not exist")
    ending = "_packed_input_ids_document.idx"
    there = sorted(f.name.removesuffix(ending) for f in prefix.parent.iterdir() if f.name.endswith(ending))
    found = f"prefixes there: {', '.join(there[:8])}" if there else "that folder holds no preprocessed data"
    return InputError(f"no data {prefix}{ending} ({found}); --data-path is the --output-prefix of preprocess_data.py")
