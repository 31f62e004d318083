"""First half of a run: rows become tokens, written row by row into files of their own."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mindspeed_llm.data.division import content_hashes
from mindspeed_llm.data.handlers import Handler
from mindspeed_llm.data.indexed_file import IndexedFileWriter
from mindspeed_llm.data.intake import CHUNK_ROWS, in_chunks
from mindspeed_llm.data.plan import Plan
from mindspeed_llm.data.progress import Progress
from mindspeed_llm.data.report import Account
from mindspeed_llm.data.rows import Row
from mindspeed_llm.data.tokenize_rows import JSON_KEY_HANDLERS, Chunk, form_handlers, tokenize_chunk
from mindspeed_llm.data.workers import in_order
from mindspeed_llm.errors import InputError

# bad rows are dropped and listed up to this share and number; beyond both, the input as a whole is taken to be wrong
TOLERATED_SHARE = 0.01
TOLERATED_ROWS = 9
REASONS_SAID = 6  # reasons in an error's one line; the others are like them


def row_file(folder: Path, name: str) -> Path:
    """Path of a field's files in the folder of a run, without .bin and .idx."""
    return folder / f"rows_{name}"


def stored_fields(plan: Plan) -> list[str]:
    """The fields that are written row by row: the mask of packed rows is made when they are packed."""
    return [name for name in plan.fields if not (plan.options.pack and name == "attention_mask")]


def write_rows(plan: Plan, folder: Path, begin: int = 0, end: int | None = None) -> Account:
    """Tokenise the rows `begin` up to `end` of the plan's mixture into files of `folder`.

    Raises:
        InputError: the input cannot be read, lacks a column, or has a bad row where none is allowed.
    """
    account = Account(warnings=list(plan.warnings))
    options = plan.options
    handlers = {None: plan.handler, **form_handlers(plan.job)}
    rows = _checked(plan.mixture.rows(begin, end), handlers, account)
    total = plan.mixture.estimate() if end is None else end - begin
    with ExitStack() as stack:
        writers = _writers(plan, folder, stack)
        progress = stack.enter_context(Progress(options.log_interval, total))
        chunks = in_chunks(rows, options.max_chars_per_row)
        made = stack.enter_context(closing(in_order(tokenize_chunk, plan.job, chunks, options.workers)))
        for chunk in made:
            account.add(chunk)
            refuse_first_bad(account, options.on_bad_row)
            _write(chunk, writers, account, options.pack)
            progress.update(chunk.read, len(chunk.ids))
    return account


def _writers(plan: Plan, folder: Path, stack: ExitStack) -> dict[str, IndexedFileWriter]:
    """A writer for every field; those of conversations have the lengths of the token ids, which are kept once."""
    writers: dict[str, IndexedFileWriter] = {}
    for name in stored_fields(plan):
        like = writers.get("input_ids") if plan.handler.KIND == "chat" or name == "attention_mask" else None
        writers[name] = stack.enter_context(IndexedFileWriter(row_file(folder, name), like=like))
    return writers


def _write(chunk: Chunk, writers: dict[str, IndexedFileWriter], account: Account, pack: bool) -> None:
    """Append a chunk's fields to their files, and the rows' content hashes to the account."""
    for number, (name, part) in enumerate(chunk.fields.items()):
        rows = [length for length in part.lengths if length >= 0]
        # rows that are packed have no documents that could end without a sequence
        lengths = rows if pack else part.lengths
        writers[name].add(part.values, lengths)
        if name == "input_ids" and "attention_mask" in writers:
            writers["attention_mask"].add(np.ones_like(part.values), lengths)
        if number == 0:
            account.hashes.extend(content_hashes(part.values, rows))


@dataclass
class _Seen:
    """What the first rows of one form hold: their number, the first one's file, the names of their columns."""

    count: int = 0
    file: str = ""
    columns: dict[str, None] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Look at one more row, which is not kept."""
        self.count += 1
        self.file = self.file or row.file
        self.columns |= dict.fromkeys(row.columns)


def _checked(rows: Iterator[Row], handlers: Mapping[str | None, Handler], account: Account) -> Iterator[Row]:
    """The rows; the first of each form are seen to have the columns that are needed.

    Args:
        handlers: of the forms, the run's own under None.
    """
    first = {form: _Seen() for form in handlers}
    for row in rows:
        yield row
        if seen := first.get(row.form):
            seen.add(row)
            if seen.count == CHUNK_ROWS:
                _check_columns(first.pop(row.form), handlers[row.form], account)
                if not first:
                    break
    for form, seen in first.items():
        _check_columns(seen, handlers[form], account)
    yield from rows


def _check_columns(seen: _Seen, handler: Handler, account: Account) -> None:
    """Raise InputError when no row has a column that is needed; warn of those that are not read."""
    present = list(seen.columns)
    for column in handler.required_columns():
        if present and column not in present:
            flag = "--json-keys" if type(handler).__name__ in JSON_KEY_HANDLERS else "--map-keys"
            raise InputError(
                f"{seen.file} has no column {column!r} (it has: {', '.join(map(str, present))}); name the columns "
                f"with {flag}"
            )
    for column in handler.ignored_columns(present):
        line = f"column {column!r} is not read; --map-keys {json.dumps({column: column})} reads it"
        if line not in account.warnings:
            account.warnings.append(line)


def refuse_first_bad(account: Account, policy: str) -> None:
    """Raise InputError at the first row that cannot be used when --on-bad-row asks for it."""
    if policy != "error" or not account.dropped:
        return
    reason, listing = next(iter(account.dropped.items()))
    place = listing.rows[0]
    raise InputError(
        f"{place['file']}, row {place['row']}: {reason}; it starts {place['excerpt']!r}: repair the row, or pass over "
        "such rows with --on-bad-row skip"
    )


def refuse_bad(account: Account, source: str, policy: str) -> None:
    """Raise InputError when the input as a whole is not usable."""
    lines = account.summary()
    more = f"; and {len(lines) - REASONS_SAID} more" if len(lines) > REASONS_SAID else ""
    reasons = "; ".join(lines[:REASONS_SAID]) + more or "it is empty"
    if account.written == 0:
        raise InputError(f"{source}: no row can be used: {reasons}")
    dropped = account.dropped_count
    if policy == "auto" and dropped > TOLERATED_ROWS and dropped > TOLERATED_SHARE * account.read:
        raise InputError(
            f"{source}: {dropped} of {account.read} rows cannot be used, nothing was written: {reasons}; repair them, "
            "or write the others with --on-bad-row skip"
        )
