"""Preprocessing inside training: the same rows and tokens as offline, made once and kept under what they follow from.

The files lie in `<cache>/<key>/`, where the key is a hash over the input files, the options, the tokenizer and the
template. A second run with the same inputs finds them there; two that begin at once do not make them twice.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data.dataset import PAIR_FIELDS
from mindspeed_llm.data.plan import CHAT_FIELDS, Plan, make_plan
from mindspeed_llm.data.preprocess import preprocess
from mindspeed_llm.data.publish import settle
from mindspeed_llm.data.report import read_report, report_path
from mindspeed_llm.errors import InputError, UsageError

NAME = "data"  # first part of the files' names in the folder of a key
LOCK = "lock"


@dataclass(frozen=True)
class Prepared:
    """Files that lie ready.

    Attributes:
        prefix: their output prefix.
        report: what became of the rows.
        made: whether this call has made them, or found them.
    """

    prefix: Path
    report: dict[str, Any]
    made: bool


def prepare_rows(options: PreprocessOptions, cache: str | Path, fields: Sequence[str] = CHAT_FIELDS) -> Prepared:
    """The files that `options` make, made now where they are not in the cache yet.

    Args:
        options: of preprocessing; the output prefix is chosen here.
        cache: folder for all such files.
        fields: that the run reads.

    Raises:
        UsageError: options that name an output, parts or a merge, or rows of another kind than wanted.
        InputError: the rows cannot be read, or the folder cannot be written to.
    """
    root, plan = _planned(options, cache, fields)
    prefix = root / plan.key[:32] / NAME
    with _locked(prefix.parent):
        settle(prefix)
        report = read_report(prefix)
        if report is not None and report.get("key") == plan.key:
            return Prepared(prefix, report, made=False)
        made = preprocess(replace(options, output_prefix=str(prefix), overwrite=True))
        return Prepared(prefix, made, made=True)


def found_rows(plan: Plan, cache: str | Path) -> Path | None:
    """The prefix under which files made as this plan says lie already, else None; writes nothing.

    Input files are taken to be those of a report by their names and sizes, and by not having been changed since it was
    written: no content is read. `prepare_rows` looks at the contents.
    """
    reports = sorted(Path(cache).expanduser().glob(f"*/{report_path(NAME)}"))
    return next((file.with_name(NAME) for file in reports if _tells_of(file, plan)), None)


def _tells_of(file: Path, plan: Plan) -> bool:
    """Whether a report is of files that this plan would make; see `found_rows`."""
    try:
        report = read_report(file.with_name(NAME)) or {}
        written = file.stat().st_mtime_ns
    except (InputError, OSError):  # another run's, damaged or being replaced; a run that needs it says so
        return False
    told = report.get("input", [])
    found = [(one.name, one.stat()) for one in plan.mixture.files]
    if [(Path(one["file"]).name, one["bytes"]) for one in told] != [(name, one.st_size) for name, one in found]:
        return False
    unchanged = all(one.st_mtime_ns < written for _, one in found)
    return unchanged and report.get("key") == plan.key_for(told)


def _planned(options: PreprocessOptions, cache: str | Path, fields: Sequence[str]) -> tuple[Path, Plan]:
    """The cache's folder and what is to be done, checked; see `prepare_rows`."""
    if options.output_prefix or options.num_shards > 1 or options.merge_group_keys:
        raise UsageError("--output-prefix, --num-shards and --merge-group-keys are of preprocess_data.py alone")
    root = Path(cache).expanduser()
    return root, plan_rows(replace(options, output_prefix=str(root / NAME)), fields)


def plan_rows(options: PreprocessOptions, fields: Sequence[str]) -> Plan:
    """What is to be done with a run's rows; of their files the names are looked at, and first rows.

    Args:
        fields: that the run reads.

    Raises:
        UsageError, InputError: as `make_plan` does, and for rows of another kind than the run reads.
    """
    plan = make_plan(options)
    check_fields(plan, fields)
    return plan


def check_fields(plan: Plan, fields: Sequence[str]) -> None:
    """Refuse rows of another kind than the run reads; `UsageError`."""
    if tuple(plan.fields) != tuple(fields):
        pairs = tuple(fields) == PAIR_FIELDS
        wanted = "pairs of answers that --stage dpo reads" if pairs else "conversations to train on"
        usual = "AlpacaStylePairwiseHandler" if pairs else "AlpacaStyleInstructionHandler"
        raise UsageError(
            f"{plan.job.handler} makes {', '.join(plan.fields)}, no {wanted}; choose another --handler-name, e.g. "
            f"{usual}"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A folder that is this process's alone; what another process of this machine makes there is waited for."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}); name another folder with --data-cache-dir"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
