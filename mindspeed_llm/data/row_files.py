"""First half of a run: rows become tokens, written row by row into files of their own."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, islice
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
from mindspeed_llm.data.tokenize_rows import Chunk, tokenize_chunk
from mindspeed_llm.data.workers import in_order
from mindspeed_llm.errors import InputError

# bad rows are dropped and listed up to this share and number; beyond both, the input as a whole is taken to be wrong
TOLERATED_SHARE = 0.01
TOLERATED_ROWS = 9


def row_file(folder: Path, field: str) -> Path:
    """Path of a field's files in the folder of a run, without .bin and .idx."""
    return folder / f"rows_{field}"


def stored_fields(plan: Plan) -> list[str]:
    """The fields that are written row by row: the mask of packed rows is made when they are packed."""
    return [field for field in plan.fields if not (plan.options.pack and field == "attention_mask")]


def write_rows(plan: Plan, folder: Path, begin: int = 0, end: int | None = None) -> Account:
    """Tokenise the rows `begin` up to `end` of the plan's mixture into files of `folder`.

    Raises:
        InputError: the input cannot be read, lacks a column, or has a bad row where none is allowed.
    """
    account = Account(warnings=list(plan.warnings))
    options = plan.options
    rows = _checked(plan.mixture.rows(begin, end), plan.handler, account)
    total = plan.mixture.estimate() if end is None else end - begin
    with ExitStack() as stack:
        writers = _writers(plan, folder, stack)
        progress = stack.enter_context(Progress(options.log_interval, total))
        chunks = in_chunks(rows, options.max_chars_per_row)
        for chunk in in_order(tokenize_chunk, plan.job, chunks, options.workers):
            account.add(chunk)
            refuse_first_bad(account, options.on_bad_row)
            _write(chunk, writers, account, options.pack)
            progress.update(chunk.read, len(chunk.ids))
    return account


def _writers(plan: Plan, folder: Path, stack: ExitStack) -> dict[str, IndexedFileWriter]:
    """A writer for every field; those of conversations have the lengths of the token ids, which are kept once."""
    writers: dict[str, IndexedFileWriter] = {}
    for field in stored_fields(plan):
        like = writers.get("input_ids") if plan.handler.KIND == "chat" or field == "attention_mask" else None
        writers[field] = stack.enter_context(IndexedFileWriter(row_file(folder, field), like=like))
    return writers


def _write(chunk: Chunk, writers: dict[str, IndexedFileWriter], account: Account, pack: bool) -> None:
    """Append a chunk's fields to their files, and the rows' content hashes to the account."""
    for number, (field, part) in enumerate(chunk.fields.items()):
        rows = [length for length in part.lengths if length >= 0]
        # rows that are packed have no documents that could end without a sequence
        lengths = rows if pack else part.lengths
        writers[field].add(part.values, lengths)
        if field == "input_ids" and "attention_mask" in writers:
            writers["attention_mask"].add(np.ones_like(part.values), lengths)
        if number == 0:
            account.hashes.extend(content_hashes(part.values, rows))


def _checked(rows: Iterator[Row], handler: Handler, account: Account) -> Iterator[Row]:
    """The rows, once the first of them are seen to have the columns that are needed."""
    head = list(islice(rows, CHUNK_ROWS))
    own = [row for row in head if row.form is None]
    present = list(dict.fromkeys(name for row in own for name in row.columns))
    for column in handler.required_columns():
        if present and column not in present:
            raise InputError(
                f"{own[0].file} has no column {column!r} (it has: {', '.join(map(str, present))}); name the columns "
                "with --map-keys"
            )
    for column in handler.ignored_columns(present):
        account.warnings.append(f"column {column!r} is not read; --map-keys {json.dumps({column: column})} reads it")
    return chain(head, rows)


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
    reasons = "; ".join(account.summary()) or "it is empty"
    if account.written == 0:
        raise InputError(f"{source}: no row can be used: {reasons}")
    dropped = account.dropped_count
    if policy == "auto" and dropped > TOLERATED_ROWS and dropped > TOLERATED_SHARE * account.read:
        raise InputError(
            f"{source}: {dropped} of {account.read} rows cannot be used, nothing was written: {reasons}; repair them, "
            "or write the others with --on-bad-row skip"
        )
