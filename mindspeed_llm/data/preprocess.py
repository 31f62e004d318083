"""Offline preprocessing: rows -> conversations -> tokens -> indexed files and a report (`preprocess_data.py`).

The files are written aside and renamed into place when all are complete; whatever goes wrong before leaves nothing
behind and the old files as they were.
"""

import gc
import logging
import signal
import sys
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data.complete import Recipe, complete
from mindspeed_llm.data.inspect_files import inspect_prefix
from mindspeed_llm.data.intake import in_chunks
from mindspeed_llm.data.plan import CHAT_FIELDS, Plan, make_plan, packing_of, refuse_existing
from mindspeed_llm.data.preview import Shown, as_text, show_row, wants_colour
from mindspeed_llm.data.publish import Aside, settle
from mindspeed_llm.data.report import read_report, report_path
from mindspeed_llm.data.row_files import refuse_bad, write_rows
from mindspeed_llm.data.shards import (
    find_shards,
    make_shard,
    merge_by_name,
    merge_shards,
    recorded_options,
    remove_shards,
    shard_files,
)  # fmt: skip
from mindspeed_llm.data.tokenize_rows import Chunk, tokenize_chunk
from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.errors import InputError

FIELDS = CHAT_FIELDS
LOOKED_AT = 1000  # rows that a preview looks at, at least, for enough that are written

GARBAGE_THRESHOLD = 20_000  # objects made before cycles among them are looked for
SWITCH_SECONDS = 0.1  # how long a thread may run while another waits

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """`preprocess_data.py`: read the options, make the files, return 0.

    Raises:
        UsageError, InputError: see `preprocess`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(PreprocessOptions, argv, "preprocess_data.py")
    previous = signal.signal(signal.SIGTERM, _exit_on_signal)  # so that what is written aside is removed
    # rows hold no cycles, and threads hand over where they wait: both limits are too low for this work
    gc.set_threshold(GARBAGE_THRESHOLD)
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        if options.inspect is not None:
            inspect_prefix(Path(options.inspect), options.preview or 10, options.tokenizer_name_or_path)
        elif options.preview and not options.merge_group_keys:
            preview(make_plan(options), options.preview)
        else:
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
    if options.merge_group_keys:
        return merge(options)
    plan = make_plan(options)
    prefix = plan.prefix
    settled = settle(prefix)
    recipe = recipe_of(plan)
    if settled and set(settled) >= set(recipe.names) and _is_of(prefix, plan):
        log.info("finished what an earlier run had begun to put in place: %s", prefix)
        if options.shard_index is None:
            remove_shards(prefix, options.num_shards)
        return read_report(prefix) or {}
    if options.num_shards == 1:
        refuse_existing([prefix.parent / name for name in recipe.names], options.overwrite)
    _make_folder(prefix)
    _say_what_is_done(plan, begin)
    report = _in_shards(plan) if options.num_shards > 1 else _at_once(plan, recipe)
    return _told(report, prefix)


def _make_folder(prefix: Path) -> None:
    """Make the folder of the files to come. Raises InputError where a file is in its way."""
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--output-prefix {prefix}: {error.filename} is a file, no folder") from error


def recipe_of(plan: Plan) -> Recipe:
    """What becomes of a plan's rows."""
    packing = packing_of(plan.options, plan.encoder.pad_id)
    return Recipe(plan.prefix, plan.stem, plan.fields, plan.options.split, packing)


def _at_once(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """The whole run in one go."""
    with Aside(plan.prefix) as aside:
        account = write_rows(plan, aside.path)
        if not plan.job.compat:
            refuse_bad(account, plan.source_name, plan.options.on_bad_row)
        about = {**plan.description, "key": plan.key}
        report = complete(recipe, aside.path, account, about, plan.encoder.tokenizer.decode)
        aside.publish(recipe.names)
    return report


def _in_shards(plan: Plan) -> dict[str, Any]:
    """The parts that are asked for; when all are, merged and removed."""
    options, count = plan.options, plan.options.num_shards
    if options.shard_index is not None:
        return read_report(make_shard(plan, options.shard_index)) or {}
    if _is_of(plan.prefix, plan) and shard_files(plan.prefix, count):
        log.info("an earlier run has merged its parts: %s", plan.prefix)  # and was killed while it removed them
    else:
        refuse_existing([plan.prefix.parent / name for name in recipe_of(plan).names], options.overwrite)
        shards = [make_shard(plan, index) for index in range(count)]
        merge_shards(shards, plan.prefix, options, plan.key, lambda _: plan.encoder.tokenizer.decode)
    remove_shards(plan.prefix, count)
    return read_report(plan.prefix) or {}


def merge(options: PreprocessOptions) -> dict[str, Any]:
    """Merge the files of the folder `--input`: parts of one run, or any whose names hold the keys."""
    folder, prefix = Path(options.input or "").expanduser(), Path(options.output_prefix or "").expanduser()
    if not folder.is_dir():
        raise InputError(f"--input {options.input}: no such folder of files to merge")
    settle(prefix)
    _make_folder(prefix)
    shards = find_shards(folder)
    if not shards:
        return merge_by_name(folder, prefix, options.merge_group_keys, options.overwrite)
    report = merge_shards(shards, prefix, recorded_options(shards, options), None, _decode_of)
    return _told(report, prefix)


def _decode_of(about: Mapping[str, Any]) -> Any:
    """The decoder of the tokenizer a report names; None where it is not on this machine."""
    try:
        return load_tokenizer(about["tokenizer"]["path"]).decode
    except InputError:
        return None


def _is_of(prefix: Path, plan: Plan) -> bool:
    """Whether the files of a prefix are those this plan would make."""
    report = read_report(prefix)
    return report is not None and report.get("key") == plan.key


def _say_what_is_done(plan: Plan, begin: float) -> None:
    log.info("building dataset: %s", plan.source_name)
    log.info("dataset will use %s to handle dataset", plan.job.handler)
    log.info("template will use %s to format dataset", plan.options.prompt_type)
    log.info("Vocab size: %s", plan.encoder.tokenizer.vocab_size)
    log.info("Output prefix: %s", plan.prefix)
    log.info("Time to startup:%s", time.monotonic() - begin)


def _told(report: dict[str, Any], prefix: Path) -> dict[str, Any]:
    """The report, its warnings and totals logged."""
    for line in report["warnings"]:
        log.warning("warning: %s", line)
    rows = report["rows"]
    log.info(
        "%s rows read, %s written as %s sequences, %s dropped, %s left out, %s cut; %s tokens, %s of them trained; %s",
        rows["read"], rows["written"], report["sequences"], rows["dropped"], rows["left_out"], report["cut"]["count"],
        report["tokens"], report["trained_tokens"], report_path(prefix),
    )  # fmt: skip
    return report


def preview(plan: Plan, count: int) -> None:
    """Print the first rows as the model gets them, and what becomes of those that it does not get."""
    colour = wants_colour(sys.stdout)
    shown = 0
    first = islice(plan.mixture.rows(), max(count * 4, LOOKED_AT))
    for rows in in_chunks(first, plan.options.max_chars_per_row):
        chunk = tokenize_chunk(plan.job, rows)
        for place in [*chunk.dropped, *chunk.left_out]:
            print(f"--- not written: row {place.row} of {place.file}: {place.note}: {place.excerpt}")
        for number, row in _rows_of(plan, chunk, shown, count):
            shown = number
            print(as_text(row, colour))
        if shown >= count:
            return
    if shown < count:
        print(f"--- {shown} of {count} rows: the input ends, or none of the next rows is written")


def _rows_of(plan: Plan, chunk: Chunk, shown: int, count: int) -> list[tuple[int, Shown]]:
    """(number, text) of the rows of a chunk, the fields of a row one after the other, up to row `count`.

    Args:
        shown: rows of earlier chunks.
    """
    decode = plan.encoder.tokenizer.decode
    answers = plan.handler.KIND == "answer"  # whose labels are a text of their own
    found: list[tuple[int, Shown]] = []
    for name in [name for name in chunk.fields if answers or not name.endswith("labels")]:
        part, at = chunk.fields[name], 0
        labels = chunk.fields.get(name.replace("input_ids", "labels")) if name.endswith("input_ids") else None
        lengths = [length for length in part.lengths if length >= 0]
        for number, length in enumerate(lengths[: count - shown], shown + 1):
            inside = slice(at, at + length)
            title = f"row {number}" + ("" if name == "input_ids" else f", {name}")
            row = show_row(title, part.values[inside], None if labels is None else labels.values[inside], decode)
            found.append((number, row))
            at += length
    return sorted(found, key=lambda entry: entry[0])
