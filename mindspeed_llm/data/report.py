"""The account of a preprocessing run: `<prefix>_report.json`, and the check of data against a training run."""

import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_llm.data.encode import IGNORE_INDEX
from mindspeed_llm.data.tokenize_rows import WITHOUT_TEMPLATE, Chunk, Place
from mindspeed_llm.errors import InputError

FORMAT = 1  # version of the report's layout
LISTED = 10_000  # rows listed per subject; the count is always exact
REASONS = 40  # reasons told apart; the rows of further ones are listed together, each with its own
OTHER_REASONS = "other reasons, given with each row"


@dataclass
class Listing:
    """How many rows, and which (the first `LISTED` of them)."""

    count: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, place: Place) -> None:
        """Count one row."""
        self.count += 1
        if len(self.rows) < LISTED:
            self.rows.append(asdict(place))

    def extend(self, other: Mapping[str, Any]) -> None:
        """Count the rows of another listing, as a report has it."""
        self.count += other["count"]
        self.rows += other["rows"][: LISTED - len(self.rows)]


@dataclass
class Account:
    """What became of the rows, counted while they pass.

    Attributes:
        read: rows found in the input; written + dropped when all went well.
        dropped: by reason, rows that cannot be used.
        left_out: by reason, rows that are well made and too long, not answered, or not trained.
        remarks: rows about which there is something else to say, by what it is.
        tokens, trained_tokens: over the rows written, before packing pads them.
        longest: tokens of the longest row.
        warnings: columns of the data that mean something and were not asked for, unused files and the like, as
            sentences.
        hashes: 64 bits of each written row's content.
    """

    read: int = 0
    written: int = 0
    dropped: dict[str, Listing] = field(default_factory=dict)
    left_out: dict[str, Listing] = field(default_factory=dict)
    cut: Listing = field(default_factory=Listing)
    untrained: Listing = field(default_factory=Listing)
    odd_thoughts: Listing = field(default_factory=Listing)
    remarks: dict[str, Listing] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    warnings: list[str] = field(default_factory=list)
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))

    def add(self, chunk: Chunk) -> None:
        """Count the rows of a chunk."""
        self.read += chunk.read
        self.written += len(chunk.lengths)
        self.tokens += len(chunk.ids)
        self.trained_tokens += int(np.count_nonzero(chunk.labels != IGNORE_INDEX))
        self.longest = max([self.longest, *chunk.lengths])
        for listings, places in (
            (self.dropped, chunk.dropped), (self.left_out, chunk.left_out), (self.remarks, chunk.remarks),
        ):  # fmt: skip
            for place in places:
                _listing(listings, place.note).add(place)
        for listing, places in (
            (self.cut, chunk.cut),
            (self.untrained, chunk.untrained),
            (self.odd_thoughts, chunk.odd_thoughts),
        ):
            _add_all(listing, places)

    @property
    def dropped_count(self) -> int:
        """Rows dropped because they cannot be used."""
        return sum(listing.count for listing in self.dropped.values())

    @property
    def left_out_count(self) -> int:
        """Rows left out for their length."""
        return sum(listing.count for listing in self.left_out.values())

    def summary(self) -> list[str]:
        """One sentence per thing a user should know about their rows."""
        lines = list(self.warnings)
        for what, listings in (("dropped", self.dropped), ("left out", self.left_out)):
            for reason, listing in listings.items():
                first = listing.rows[0]
                place = f"(first: row {first['row']} of {first['file']})"
                lines.append(f"{what} {_rows(listing.count)}: {reason} {place}")
        for listing, what in (
            (self.cut, "cut to the length"),
            (self.untrained, "no token is trained (empty answers)"),
            (self.odd_thoughts, "thought tags that make no whole thought as the template writes it"),
        ):
            if listing.count:
                lines.append(f"{_rows(listing.count)}: {what}")
        lines += [f"{_rows(listing.count)}: {remark}" for remark, listing in self.remarks.items()]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The account as JSON values."""
        return {
            "rows": {
                "read": self.read,
                "written": self.written,
                "dropped": self.dropped_count,
                "left_out": self.left_out_count,
            },
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "longest_row": self.longest,
            "dropped": {reason: asdict(listing) for reason, listing in self.dropped.items()},
            "left_out": {reason: asdict(listing) for reason, listing in self.left_out.items()},
            "cut": asdict(self.cut),
            "untrained": asdict(self.untrained),
            "unrecognised_thoughts": asdict(self.odd_thoughts),
            "remarks": {remark: asdict(listing) for remark, listing in self.remarks.items()},
            "notes": self.warnings,
            "warnings": self.summary(),
        }

    @classmethod
    def merged(cls, reports: Sequence[Mapping[str, Any]]) -> "Account":
        """The account of several runs' rows one after the other, from what `to_dict` made of each."""
        whole = cls()
        for report in reports:
            whole.read += report["rows"]["read"]
            whole.written += report["rows"]["written"]
            whole.tokens += report["tokens"]
            whole.trained_tokens += report["trained_tokens"]
            whole.longest = max(whole.longest, report["longest_row"])
            for listings, name in (
                (whole.dropped, "dropped"), (whole.left_out, "left_out"), (whole.remarks, "remarks"),
            ):  # fmt: skip
                for reason, listing in report[name].items():
                    _listing(listings, reason).extend(listing)
            for listing, name in (
                (whole.cut, "cut"), (whole.untrained, "untrained"), (whole.odd_thoughts, "unrecognised_thoughts"),
            ):  # fmt: skip
                listing.extend(report[name])
            whole.warnings += [line for line in report["notes"] if line not in whole.warnings]
        return whole


def _listing(listings: dict[str, Listing], reason: str) -> Listing:
    """The listing of a reason; reasons that quote the data are not let grow without bound."""
    if reason not in listings and len(listings) >= REASONS:
        reason = OTHER_REASONS
    return listings.setdefault(reason, Listing())


def _rows(count: int) -> str:
    return f"{count} row" + ("" if count == 1 else "s")


def _add_all(listing: Listing, places: Iterable[Place]) -> None:
    for place in places:
        listing.add(place)


def report_path(prefix: str | Path) -> Path:
    """Where the report of an output prefix lies."""
    return Path(f"{prefix}_report.json")


def read_report(prefix: str | Path) -> dict[str, Any] | None:
    """The report of an output prefix; None when there is none (data made by other programs).

    Raises:
        InputError: there is one, and it cannot be read.
    """
    file = report_path(prefix)
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); preprocess again or remove it") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a report of preprocess_data.py; preprocess again or remove it")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write and force to disk; the caller renames it into place."""
    with file.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, ensure_ascii=False, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def check_data_matches(
    report: Mapping[str, Any] | None,
    tokenizer_hash: str,
    template: str | None = None,
    enable_thinking: str | None = None,
    template_hash: str | None = None,
    name: str = "the data",
) -> None:
    """Refuse data made with another tokenizer, template or thinking mode than the run's.

    Args:
        report: of the data; None (data made by other programs) is let pass, there being nothing to compare.
        tokenizer_hash: `Tokenizer.content_hash` of the model to be trained.
        template: the run's `--prompt-type`; None when it names none.
        enable_thinking: the run's mode; None when it names none.
        template_hash: `content_hash` of the run's template; None when it is not known.
        name: what the error calls the data.

    Raises:
        InputError: naming both sides and the remedy.
    """
    if report is None:
        return
    made = report.get("tokenizer", {})
    if made.get("sha256") != tokenizer_hash:
        raise InputError(
            f"{name} were made with the tokenizer in {made.get('path')} (sha256 {str(made.get('sha256'))[:12]}), the "
            f"model's has sha256 {tokenizer_hash[:12]}; preprocess again with the model's tokenizer"
        )
    made = report.get("template", {})
    sides = [("--prompt-type", made.get("name"), template)]
    if made.get("uses_thinking"):
        sides.append(("--enable-thinking", report.get("enable_thinking"), enable_thinking))
    for flag, of_data, of_run in sides:
        if of_run is not None and of_run != of_data:
            raise InputError(
                f"{name} were made with {flag} {of_data}, the run asks for {of_run}; use the same for both"
            )
    if None not in (template_hash, made.get("sha256")) and template_hash != made["sha256"]:
        raise InputError(
            f"{name} were made with another text of template {made.get('name')} (sha256 {made['sha256'][:12]}) "
            f"than the run's (sha256 {str(template_hash)[:12]}); preprocess again, or name their templates file "
            "by --prompt-type-path"
        )


def check_data_agree(reports: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Refuse data sets of one run that were made with different tokenizers or templates.

    Thinking modes may differ: a model learns from such a mixture to answer in each. Running text and rows that their
    handler lays out have no template, and go with any.

    Args:
        reports: of each data set, by its name; those without a report are let pass.

    Raises:
        InputError: naming two that differ and in what.
    """
    known = [(name, report) for name, report in reports.items() if report is not None]
    _same("tokenizer", [(name, report.get("tokenizer", {}).get("sha256")) for name, report in known])
    templates = [(name, report.get("template", {})) for name, report in known]
    laid_out = [(name, template) for name, template in templates if template.get("name") != WITHOUT_TEMPLATE]
    _same("template", [(name, template.get("name")) for name, template in laid_out])
    _same("content of the template", [(name, template.get("sha256")) for name, template in laid_out])


def _same(what: str, values: Sequence[tuple[str, str | None]]) -> None:
    """Raise InputError where data sets differ in something."""
    for name, value in values[1:]:
        if value != values[0][1]:
            raise InputError(
                f"{values[0][0]} and {name} were made with different settings ({what}: {str(values[0][1])[:12]} and "
                f"{str(value)[:12]}), and a model learns one; preprocess again with the same"
            )
