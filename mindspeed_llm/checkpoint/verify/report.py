"""The verdict: one table for people, one line, and `precision_report.json` for everything else."""

import json
import platform
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mindspeed_llm.checkpoint.atomic import write_text
from mindspeed_llm.checkpoint.sizes import human
from mindspeed_llm.checkpoint.verify.copies import Copy
from mindspeed_llm.checkpoint.verify.trace import Agreement
from mindspeed_llm.checkpoint.verify.weights import Row

FILE = "precision_report.json"
PASS, FAIL, PARTIAL, SKIPPED = "PASS", "FAIL", "PARTIAL", "SKIPPED"
SHOWN = 12
"""Rows of the table of tensors on standard output."""
PACKAGES = ("torch", "transformers", "peft", "megatron-core", "safetensors")


@dataclass(frozen=True)
class Check:
    """One question and its answer: PASS, FAIL or SKIPPED, and why."""

    name: str
    status: str
    detail: str


@dataclass
class Verdict:
    """Everything that was found out.

    Attributes:
        checks: in the order in which they were made.
        rows: the table of tensors.
        copies: stored copies that are wrong.
        agreements: of logits.
        facts: what was compared, on which text, how.
        seconds, peak_bytes: what it took.
        path: where the report lies.
    """

    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int = 0
    path: Path | None = None

    @property
    def status(self) -> str:
        """FAIL when any check failed, else PARTIAL when any was skipped, else PASS."""
        found = {check.status for check in self.checks}
        return FAIL if FAIL in found else PARTIAL if SKIPPED in found or not found else PASS

    def add(self, name: str, passed: bool, detail: str) -> None:
        """Add a check that was made."""
        self.checks.append(Check(name, PASS if passed else FAIL, detail))

    def skip(self, name: str, reason: str) -> None:
        """Add a check that could not be made."""
        self.checks.append(Check(name, SKIPPED, reason))

    def lines(self) -> list[str]:
        """The table and the verdict line."""
        shown = []
        if any(not row.passed or row.rounded for row in self.rows):
            worst = sorted(self.rows, key=Row.badness, reverse=True)
            worst = [row for row in worst if not row.passed or row.rounded][:SHOWN]
            shown.append(f"{'tensor':<58} {'verdict':<9} {'max|d|':>9} {'differing':>12} {'rounded':>8}")
            shown += [
                f"{row.name:<58.58} {row.note or row.verdict:<9} {row.largest:9.2e} {row.differing:12}"
                f" {row.rounded:8}" + (f"  {row.nonfinite} NaN/Inf" if row.nonfinite else "")
                for row in worst
            ]
        shown += [f"{check.status:<8} {check.name:<12} {check.detail}" for check in self.checks]
        where = f": {self.path}" if self.path else ""
        shown.append(f"precision: {self.status} in {self.seconds:.1f} s, peak memory {human(self.peak_bytes)}{where}")
        return shown

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "verdict": self.status,
            "command": sys.argv,
            "versions": {"python": platform.python_version(), **versions()},
            **self.facts,
            "seconds": round(self.seconds, 2),
            "peak_bytes": self.peak_bytes,
            "checks": [asdict(check) for check in self.checks],
            "logits": [one.to_dict() for one in self.agreements],
            "wrong_copies": [one.to_dict() for one in self.copies],
            "tensors": [row.to_dict() for row in sorted(self.rows, key=Row.badness, reverse=True)],
        }

    def write(self, path: Path) -> None:
        """Write the report; numbers JSON lacks become text."""
        self.path = path
        write_text(path, json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """The same value with "nan" and "inf" in place of the numbers."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def versions() -> dict[str, str]:
    """Versions of the packages that computed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found
