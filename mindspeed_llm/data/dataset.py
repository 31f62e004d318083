"""The training side of indexed files: rows by number, several files as one data set, a validation split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mindspeed_llm.data.division import divide, hash_rows, split_shares
from mindspeed_llm.data.indexed_file import IndexedFile
from mindspeed_llm.data.messages import SIDES
from mindspeed_llm.data.report import read_report
from mindspeed_llm.errors import InputError

REQUIRED_FIELDS = ("input_ids", "labels")
PAIR_FIELDS = tuple(f"{side}_{field}" for side in SIDES for field in REQUIRED_FIELDS)
KINDS = {
    REQUIRED_FIELDS: ("rows with answers, which --stage sft reads", "AlpacaStyleInstructionHandler"),
    PAIR_FIELDS: ("pairs of answers, which --stage dpo reads", "AlpacaStylePairwiseHandler"),
}
"""What the files of these fields hold, and a handler that makes them."""
Sample = dict[str, Any]
Fields = dict[str, IndexedFile]  # of one prefix, by name


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
        REQUIRED, OPTIONAL: fields, a pair of files each.
        prefixes: as given.
        reports: `<prefix>_report.json` of each prefix; None for data made by other programs.
        lengths: [rows] int32.
    """

    REQUIRED: tuple[str, ...] = REQUIRED_FIELDS
    OPTIONAL: tuple[str, ...] = ("attention_mask",)

    def __init__(self, prefixes: str | Path | Sequence[str | Path]) -> None:
        """Open the files of `<prefix>_packed_*_document`; a prefix is taken literally.

        Raises:
            InputError: files missing, truncated, or of different numbers of rows.
        """
        listed = [prefixes] if isinstance(prefixes, (str, Path)) else list(prefixes)
        if not listed:
            raise InputError("no data: give --data-path the output prefix of preprocess_data.py")
        self.prefixes = [Path(prefix).expanduser() for prefix in listed]
        self._parts = [self._opened(prefix) for prefix in self.prefixes]
        self.reports = [read_report(prefix) for prefix in self.prefixes]
        self.lengths = np.concatenate([self._lengths(part) for part in self._parts])
        self._ends = np.cumsum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Rows of each prefix."""
        return [len(part[self.REQUIRED[0]]) for part in self._parts]

    def _opened(self, prefix: Path) -> Fields:
        """The files of a prefix, checked to belong together."""
        found = open_fields(prefix, self.REQUIRED, self.OPTIONAL)
        check_same_rows(prefix, found)
        return found

    def _lengths(self, part: Fields) -> np.ndarray:
        """[rows] int32, tokens of the rows of one prefix."""
        return part["input_ids"].lengths

    @property
    def neat_packed(self) -> bool:
        """Whether a row holds several samples that must not see each other (`--neat-pack`)."""
        if all(report is not None for report in self.reports):
            return any(report["neat_pack"] for report in self.reports if report)
        masks = [part["attention_mask"] for part in self._parts if "attention_mask" in part]
        return any(len(mask) > 0 and int(mask[0].max(initial=0)) > 1 for mask in masks)

    def content_hashes(self) -> np.ndarray:
        """[rows] uint64, a hash of each row's tokens (of pairs, the chosen ones); every token is read once."""
        return np.concatenate([hash_rows(part[self.REQUIRED[0]].prefix) for part in self._parts])

    @property
    def may_be_packed(self) -> bool:
        """Whether a row may hold several texts: made with `--pack`, or by a program that left no report."""
        return any(report is None or report.get("pack", True) for report in self.reports)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Sample:
        """Row `row`: read-only arrays on the mapped files, and its name for errors."""
        sample = self._fields(row)
        if "attention_mask" not in sample:
            sample["attention_mask"] = np.ones(len(sample["input_ids"]), np.int32)
        return sample

    def _fields(self, row: int) -> Sample:
        """The fields of row `row` as they are stored, and its name."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = int(np.searchsorted(self._ends, row, side="right"))
        number = row - (int(self._ends[part - 1]) if part else 0)
        sample: Sample = {field: file[number] for field, file in self._parts[part].items()}
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


def open_fields(prefix: Path, required: Sequence[str], optional: Sequence[str]) -> Fields:
    """The indexed files of a prefix by field."""
    base = find_base(prefix, required)
    if base is None:
        raise _missing(prefix, required)
    fields = {}
    for field in (*required, *optional):
        file = Path(f"{base}_{field}_document")
        if field in required or Path(f"{file}.idx").exists() or Path(f"{file}.bin").exists():
            fields[field] = IndexedFile(file)
    return fields


def check_same_rows(prefix: Path, fields: Fields) -> None:
    """Refuse fields with other rows than the first one; `InputError`."""
    name, first = next(iter(fields.items()))
    for field, file in fields.items():
        if len(file) != len(first) or not np.array_equal(file.lengths, first.lengths):
            raise InputError(
                f"{prefix}: {name} has {len(first)} rows of {int(first.lengths.sum())} tokens, {field} has "
                f"{len(file)} of {int(file.lengths.sum())}; they are from different runs, preprocess again"
            )


def find_base(prefix: Path, required: Sequence[str] = REQUIRED_FIELDS) -> Path | None:
    """`<prefix>_packed`, also when the prefix was given with that ending or as one of its files; None without files.

    Args:
        required: fields that every row has.
    """
    name = prefix.name
    for kind in (".bin", ".idx"):
        name = name.removesuffix(kind)
    for field in sorted((*required, "attention_mask"), key=len, reverse=True):
        name = name.removesuffix(f"_{field}_document")
    for base in (f"{name}_packed", name):
        if any((prefix.parent / f"{base}_{field}_document.idx").exists() for field in required):
            return prefix.parent / base
    return None


def _missing(prefix: Path, required: Sequence[str]) -> InputError:
    """The error for a prefix without files: what it holds instead, or the prefixes that there are."""
    if not prefix.parent.is_dir():
        return InputError(f"no data {prefix}: the folder {prefix.parent} does not exist")
    for fields, (content, _) in KINDS.items():
        if fields != required and find_base(prefix, fields) is not None:
            wanted, handler = KINDS[tuple(required)]
            return InputError(
                f"{prefix} holds {content}, and this run wants {wanted}; preprocess with such a --handler-name, e.g. "
                f"{handler}, or change --stage"
            )
    ending = f"_packed_{required[0]}_document.idx"
    there = sorted(f.name.removesuffix(ending) for f in prefix.parent.iterdir() if f.name.endswith(ending))
    found = f"prefixes there: {', '.join(there[:8])}" if there else "that folder holds no preprocessed data"
    return InputError(f"no data {prefix}{ending} ({found}); --data-path is the --output-prefix of preprocess_data.py")
