"""Offline preprocessing: rows -> conversations -> tokens -> indexed files and a report (`preprocess_data.py`).

The files are written aside and renamed into place when all are complete; whatever goes wrong before leaves nothing
behind and the old files as they were.
"""

import json
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_llm.arguments.parser import parse, to_dict
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data.encode import IGNORE_INDEX, Limits
from mindspeed_llm.data.encoders import Encoder
from mindspeed_llm.data.handlers import DEFAULT_HANDLER, Handler, Reading
from mindspeed_llm.data.indexed_file import IndexedFile, IndexedFileWriter
from mindspeed_llm.data.intake import CHUNK_ROWS, in_chunks
from mindspeed_llm.data.packing import greedy_packs
from mindspeed_llm.data.progress import Progress
from mindspeed_llm.data.report import FORMAT, Account, report_path, write_json
from mindspeed_llm.data.rows import Row, file_hash, find_files, read_rows
from mindspeed_llm.data.shaping import Shape
from mindspeed_llm.data.tokenize_rows import Job, output_fields, tokenize_all, tools
from mindspeed_llm.errors import InputError, UsageError

FIELDS = ("input_ids", "attention_mask", "labels")
# bad rows are dropped and listed up to this share and number; beyond both, the input as a whole is taken to be wrong
TOLERATED_SHARE = 0.01
TOLERATED_ROWS = 9

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """`preprocess_data.py`: read the options, make the files, return 0.

    Raises:
        UsageError, InputError: see `preprocess`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(PreprocessOptions, argv, "preprocess_data.py")
    previous = signal.signal(signal.SIGTERM, _exit_on_signal)  # so that what is written aside is removed
    try:
        preprocess(options)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _exit_on_signal(number: int, frame: object) -> None:
    """Unwind and leave with the status a shell gives to a process ended by this signal."""
    raise SystemExit(128 + number)


def preprocess(options: PreprocessOptions) -> dict[str, Any]:
    """Make `<output-prefix>_packed_{input_ids,attention_mask,labels}_document.{bin,idx}` and `<prefix>_report.json`.

    Returns the report. Raises:
        UsageError: unknown handler, template or key.
        InputError: the input cannot be read, too many of its rows are bad, or the output exists.
    """
    begin = time.monotonic()
    job = _job(options)
    handler, encoder = tools(job)
    files, unused = find_files(options.input)
    prefix = Path(options.output_prefix).expanduser()
    fields = output_fields(handler)
    if options.pack and fields != list(FIELDS):
        raise UsageError(f"--pack joins rows of conversations; {options.handler_name} makes {', '.join(fields)}")
    names = [_file_name(prefix.name, handler, field) for field in fields]
    targets = [prefix.with_name(f"{name}.{kind}") for kind in ("bin", "idx") for name in names]
    targets.append(report_path(prefix))
    _refuse_existing(targets, options.overwrite)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    log.info("building dataset: %s", options.input)
    log.info("dataset will use %s to handle dataset", options.handler_name)
    log.info("template will use %s to format dataset", options.prompt_type)
    log.info("Vocab size: %s", encoder.tokenizer.vocab_size)
    log.info("Output prefix: %s", prefix)
    log.info("Time to startup:%s", time.monotonic() - begin)

    account = Account(warnings=_warnings(options, unused, encoder))
    aside = Path(tempfile.mkdtemp(prefix=f".{prefix.name}.", suffix=".partial", dir=prefix.parent))
    try:
        rows = _checked(read_rows(files), handler, account)
        _write_rows(aside, job, rows, options, account)
        if not job.compat:
            _refuse_bad(account, options.input, options.on_bad_row)
        sequences = _pack(aside, options, encoder.pad_id) if options.pack else account.written
        report = _report(options, files, encoder, account, sequences)
        write_json(aside / targets[-1].name, report)
        _publish(aside, targets)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for line in account.summary():
        log.warning("warning: %s", line)
    log.info(
        "%s rows read, %s written as %s sequences, %s dropped, %s cut; %s tokens, %s of them trained; %s",
        account.read, account.written, sequences, account.dropped_count, account.cut.count, account.tokens,
        account.trained_tokens, targets[-1],
    )  # fmt: skip
    return report


def _job(options: PreprocessOptions) -> Job:
    try:
        map_keys = json.loads(options.map_keys or "{}")
    except ValueError as error:
        raise UsageError(f"--map-keys is not valid JSON ({error}): {options.map_keys}") from error
    if options.output_prefix.endswith(("/", os.sep)):
        raise UsageError(f"--output-prefix {options.output_prefix} ends with the folder; add a name, e.g. alpaca")
    if not isinstance(map_keys, dict):
        raise UsageError(f"--map-keys must be a JSON object of key and column, got {options.map_keys}")
    return Job(
        tokenizer=options.tokenizer_name_or_path,
        template=options.prompt_type,
        template_file=options.prompt_type_path,
        enable_thinking=options.enable_thinking,
        handler=options.handler_name or DEFAULT_HANDLER,
        map_keys=json.dumps(map_keys, sort_keys=True),
        limits=Limits(options.seq_length, options.append_eod, options.pack, options.neat_pack),
        system=options.system,
        shape=Shape(
            options.max_length, options.truncation_strategy, options.mask_history, options.train_on_prompt
        ),
        compat=options.compat,
        allow_control_tokens=options.allow_control_tokens,
        reading=Reading(
            options.compat is not None, tuple(options.json_keys), tuple(options.dataset_additional_keys)
        ),
        pad_to_multiple_of=options.pad_to_multiple_of,
    )


def _refuse_existing(targets: list[Path], overwrite: bool) -> None:
    existing = [str(t) for t in targets if t.exists()]
    if existing and not overwrite:
        raise InputError(f"{existing[0]} exists; give --overwrite to replace it, or another --output-prefix")


def _warnings(options: PreprocessOptions, unused: list[Path], encoder: Encoder) -> list[str]:
    found = []
    if unused:
        names = ", ".join(f.name for f in unused[:5]) + (" ..." if len(unused) > 5 else "")
        found.append(f"{len(unused)} files of the input folder have another format and are not read: {names}")
    if options.append_eod and encoder.answers_end_with_eos():
        found.append(f"template {options.prompt_type} already ends answers with end-of-text; --append-eod adds another")
    return found


def _checked(rows: Iterator[Row], handler: Handler, account: Account) -> Iterator[Row]:
    """The rows, once the first of them are seen to have the columns that are needed."""
    head = list(islice(rows, CHUNK_ROWS))
    present = list(dict.fromkeys(name for row in head for name in row.columns))
    for column in handler.required_columns():
        if present and column not in present:
            raise InputError(
                f"{head[0].file} has no column {column!r} (it has: {', '.join(map(str, present))}); name the columns "
                "with --map-keys"
            )
    for column in handler.ignored_columns(present):
        account.warnings.append(f"column {column!r} is not read; --map-keys {json.dumps({column: column})} reads it")
    return chain(head, rows)


def _write_rows(aside: Path, job: Job, rows: Iterator[Row], options: PreprocessOptions, account: Account) -> None:
    """Tokenise all rows into the files of `aside`."""
    name = "rows" if options.pack else Path(options.output_prefix).name
    handler = tools(job)[0]
    names = [f for f in output_fields(handler) if not (options.pack and f == "attention_mask")]
    with ExitStack() as stack:
        writers = {
            f: stack.enter_context(IndexedFileWriter(aside / _file_name(name, handler, f))) for f in names
        }
        progress = stack.enter_context(Progress(options.log_interval))
        for chunk in tokenize_all(job, in_chunks(rows, options.max_chars_per_row), options.workers):
            account.add(chunk)
            _refuse_first_bad(account, options.on_bad_row)
            for field, part in chunk.fields.items():
                writers[field].add(part.values, _kept_lengths(part.lengths, options.pack))
                if field == "input_ids" and "attention_mask" in writers:
                    writers["attention_mask"].add(np.ones_like(part.values), part.lengths)
            progress.update(chunk.read, len(chunk.ids))


def _file_name(name: str, handler: Handler, field: str) -> str:
    """Name of a field's files, without .bin and .idx: those of conversations say `packed`, packed or not."""
    return f"{name}_{field}_document" if handler.KIND == "text" else f"{name}_packed_{field}_document"


def _kept_lengths(lengths: list[int], pack: bool) -> list[int]:
    """The lengths to write: rows to be packed have no documents that could end without a sequence."""
    return [length for length in lengths if length >= 0] if pack else lengths


def _refuse_first_bad(account: Account, policy: str) -> None:
    """Raise at the first row that cannot be used when --on-bad-row asks for it."""
    if policy != "error" or not account.dropped:
        return
    reason, listing = next(iter(account.dropped.items()))
    place = listing.rows[0]
    raise InputError(
        f"{place['file']}, row {place['row']}: {reason}; it starts {place['excerpt']!r}: repair the row, or pass over "
        "such rows with --on-bad-row skip"
    )


def _refuse_bad(account: Account, source: str, policy: str) -> None:
    """Raise when the input as a whole is not usable."""
    reasons = "; ".join(account.summary()) or "it is empty"
    if account.written == 0:
        raise InputError(f"{source}: no row can be used: {reasons}")
    dropped = account.dropped_count
    if policy == "auto" and dropped > TOLERATED_ROWS and dropped > TOLERATED_SHARE * account.read:
        raise InputError(
            f"{source}: {dropped} of {account.read} rows cannot be used, nothing was written: {reasons}; repair them, "
            "or write the others with --on-bad-row skip"
        )


def _pack(aside: Path, options: PreprocessOptions, pad_id: int) -> int:
    """Join the rows of `aside` into sequences of --seq-length; returns how many there are.

    Each of the --n-subs parts of the rows is packed on its own, in upstream's order.
    """
    length = options.seq_length
    assert length is not None  # the options' own check
    ids, labels = (IndexedFile(aside / f"rows_packed_{field}_document") for field in ("input_ids", "labels"))
    name = Path(options.output_prefix).name
    part = max(len(ids) // options.n_subs, 1)
    count = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedFileWriter(aside / f"{name}_packed_{f}_document")) for f in FIELDS]
        for begin in range(0, len(ids), part):
            lengths = ids.lengths[begin : begin + part].tolist()
            packs = greedy_packs(lengths, length - 1)
            log.info("valid_num = %s, total_num = %s, percentage : 100.0%%", len(lengths), len(lengths))
            log.info("new samples num : %s", len(packs))
            count += len(packs)
            for pack in packs:
                rows = [begin + row for row in pack]
                sequences = (
                    _joined([ids[row] for row in rows], length, pad_id),
                    _pack_mask([lengths[row] for row in pack], length, options.neat_pack),
                    _joined([labels[row] for row in rows], length, IGNORE_INDEX),
                )
                for writer, sequence in zip(writers, sequences, strict=True):
                    writer.add(sequence, [length])
    return count


def _joined(rows: list[np.ndarray], length: int, filler: int) -> np.ndarray:
    """The rows one after the other [length], the rest filled up."""
    sequence = np.full(length, filler, np.int32)
    tokens = np.concatenate(rows)
    sequence[: len(tokens)] = tokens
    return sequence


def _pack_mask(lengths: list[int], length: int, neat: bool) -> np.ndarray:
    """Attention mask [length]: all ones; or, neat, the number of the row in the pack from 1, padding 0."""
    if not neat:
        return np.ones(length, np.int32)
    numbers = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    return np.pad(numbers, (0, length - len(numbers)))


def _report(
    options: PreprocessOptions, files: list[Path], encoder: Encoder, account: Account, sequences: int
) -> dict[str, Any]:
    """The report's content; its layout is described in docs/data.md."""
    tokenizer, template = encoder.tokenizer, encoder.template
    return {
        "format": FORMAT,
        "input": [{"file": str(f), "bytes": f.stat().st_size, "sha256": file_hash(f)} for f in files],
        "handler": options.handler_name,
        "template": {
            "name": template.name,
            "sha256": template.content_hash,
            "uses_thinking": template.uses_thinking,
        },
        "enable_thinking": encoder.thinking,
        "tokenizer": {
            "path": str(tokenizer.path),
            "sha256": tokenizer.content_hash,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": encoder.eos_id,
            "pad_id": encoder.pad_id,
        },
        "sequences": sequences,
        "seq_length": options.seq_length,
        "pack": options.pack,
        "neat_pack": options.neat_pack,
        **account.to_dict(),
        "limits": asdict(Limits(options.seq_length, options.append_eod, options.pack)),
        "options": to_dict(options),
    }


def _publish(aside: Path, targets: list[Path]) -> None:
    """Rename the finished files into place: tokens, then indices, then the report.

    Old indices go first, so that a run killed here leaves an incomplete set, which is refused, and never a mixed one.
    """
    for target in targets:
        if target.suffix != ".bin":
            target.unlink(missing_ok=True)
    for target in targets:
        (aside / target.name).replace(target)
    folder = os.open(targets[0].parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
