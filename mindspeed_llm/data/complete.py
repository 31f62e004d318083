"""Second half of a run: the rows' files become those of training, with their report and its page."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_llm.data.division import PARTS, count_duplicates, divide, split_shares
from mindspeed_llm.data.finish import Packed, Packing, copy_rows, pack_files
from mindspeed_llm.data.indexed_file import RowFile
from mindspeed_llm.data.preview import Decode, Shown, show_row
from mindspeed_llm.data.report import Account, report_path, write_json
from mindspeed_llm.data.report_html import page
from mindspeed_llm.data.row_files import row_file
from mindspeed_llm.errors import UsageError

SHOWN_ROWS = 3  # rows shown in the page
BINS = 40  # bars of the histogram of lengths


@dataclass(frozen=True)
class Recipe:
    """What becomes of the rows' files.

    Attributes:
        prefix: path and first part of the name of the files.
        stem: what stands between prefix and field.
        fields: all that are to be written; those stored row by row are in the folder.
        split: shares as `--split` has them, None to divide nothing.
        packing: how rows are joined, None when they are not.
    """

    prefix: Path
    stem: str
    fields: list[str]
    split: str | None
    packing: Packing | None

    @property
    def parts(self) -> list[str]:
        """Endings of the prefix, one for each part: none, or those whose share is above zero."""
        if self.split is None:
            return [""]
        return [f"_{part}" for part, share in zip(PARTS, split_shares(self.split), strict=True) if share]

    def file_name(self, part: str, field: str) -> str:
        """Name of a field's files, without .bin and .idx."""
        return f"{self.prefix.name}{part}{self.stem}_{field}_document"

    @property
    def names(self) -> list[str]:
        """All files in the order in which they are published: tokens, indices, pages, reports."""
        files = [self.file_name(part, field) for part in self.parts for field in self.fields]
        reports = [report_path(f"{self.prefix.name}{part}").name for part in self.parts]
        whole = report_path(self.prefix.name).name
        return [
            *(f"{file}.bin" for file in files),
            *(f"{file}.idx" for file in files),
            Path(whole).with_suffix(".html").name,
            *(report for report in reports if report != whole),
            whole,
        ]


def complete(
    recipe: Recipe, folder: Path, account: Account, about: Mapping[str, Any], decode: Decode | None
) -> dict[str, Any]:
    """Make all files of `recipe.names` in `folder` from the rows' files there; returns the report.

    Args:
        account: of the rows.
        about: what the report says besides.
        decode: token ids to text, for the rows shown in the page; None shows none.

    Raises:
        InputError: fewer different rows than parts of the split.
    """
    files = {field: row_file(folder, field) for field in recipe.fields}
    stored = {field: file for field, file in files.items() if Path(f"{file}.idx").exists()}
    first = next(iter(stored))
    hashes = np.frombuffer(account.hashes, np.uint64)
    with RowFile(stored[first]) as rows:
        lengths = rows.lengths
        shown = _shown(stored, first, len(rows), decode)
    made = _make_parts(recipe, folder, stored, hashes, lengths)
    sequences = sum(part["sequences"] for part in made.values())
    report: dict[str, Any] = {
        **about,
        "sequences": sequences,
        **account.to_dict(),
        "duplicates": count_duplicates(hashes),
        "histogram": length_histogram(lengths),
    }
    if recipe.packing is not None:
        report["fill"] = account.tokens / (sequences * recipe.packing.length)
    if recipe.split is not None:
        report["parts"] = {part[1:]: numbers for part, numbers in made.items()}
        for part, numbers in made.items():
            own = folder / report_path(f"{recipe.prefix.name}{part}").name
            write_json(own, {**report, **numbers, "part": part[1:]})
    whole = folder / report_path(recipe.prefix.name).name
    write_json(whole, report)
    whole.with_suffix(".html").write_text(page(report, shown, recipe.prefix.name), encoding="utf-8")
    return report


def _make_parts(
    recipe: Recipe, folder: Path, stored: Mapping[str, Path], hashes: np.ndarray, lengths: np.ndarray
) -> dict[str, dict[str, Any]]:
    """The files of every part; what each holds, by the ending of its prefix."""
    if recipe.split is None:
        return {"": _make_part(recipe, folder, "", dict(stored), len(lengths))}
    _refuse_uneven(stored, len(hashes))
    shares = split_shares(recipe.split)
    part_of = divide(hashes, recipe.split)
    made = {}
    for number, name in enumerate(PARTS):
        if not shares[number]:
            continue
        chosen = part_of == number
        files = {field: folder / f"part_{field}" for field in stored}
        for field, file in files.items():
            copy_rows(stored[field], file, chosen)
        made[f"_{name}"] = _make_part(recipe, folder, f"_{name}", files, int(chosen.sum()))
    return made


def _make_part(recipe: Recipe, folder: Path, part: str, files: dict[str, Path], rows: int) -> dict[str, Any]:
    """One part's files, from rows' files that are used up by it."""
    targets = {field: folder / recipe.file_name(part, field) for field in recipe.fields}
    if recipe.packing is not None:
        packed = pack_files(files, targets, recipe.packing)
        return {"rows": rows, "sequences": packed.sequences, "fill": packed.fill, **_padding(packed)}
    for field, file in files.items():
        for kind in ("bin", "idx"):
            Path(f"{file}.{kind}").replace(f"{targets[field]}.{kind}")
    return {"rows": rows, "sequences": rows}


def _padding(packed: Packed) -> dict[str, int]:
    return {"packed_tokens": packed.tokens, "padding": packed.sequences * packed.length - packed.tokens}


def _refuse_uneven(stored: Mapping[str, Path], rows: int) -> None:
    """Raise where the fields have different rows, so that a row has no part."""
    for field, file in stored.items():
        with RowFile(file) as other:
            if len(other) != rows:
                raise UsageError(
                    f"--split: field {field} has {len(other)} rows, the first field {rows}; split columns of running "
                    "text one at a time"
                )


def _shown(stored: Mapping[str, Path], first: str, count: int, decode: Decode | None) -> list[Shown]:
    """The first rows, ready for the page."""
    if decode is None:
        return []
    labels = first.replace("input_ids", "labels")
    shown = []
    for number in range(min(count, SHOWN_ROWS)):
        with RowFile(stored[first]) as ids:
            tokens = ids.row(number)
        trained = None
        if labels != first and labels in stored:
            with RowFile(stored[labels]) as file:
                # labels of another length are a text of their own (R1 handlers)
                trained = file.row(number) if len(tokens) == file.lengths[number] else None
        shown.append(show_row(f"row {number + 1}", tokens, trained, decode))
    return shown


def length_histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """Rows by length: `edges` [bins + 1] in tokens, evenly spaced round numbers, and `rows` [bins]."""
    longest = int(lengths.max(initial=0))
    step = _round_up(max(longest, 1) / BINS)
    edges = np.arange(0, longest + step + 1, step)
    counts, _ = np.histogram(lengths, edges)
    return {"edges": edges.tolist(), "rows": counts.tolist()}


def _round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ... that is not below `value`."""
    power = 10 ** max(math.floor(math.log10(value)), 0) if value > 0 else 1
    return int(next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= value))
