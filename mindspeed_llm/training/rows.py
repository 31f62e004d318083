"""The rows of a run: prepared files opened, or raw rows prepared by one process for all, and held against the model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mindspeed_llm.arguments.programs import PosttrainOptions
from mindspeed_llm.checkpoint.recorded import tokenizer_folder
from mindspeed_llm.data.dataset import PAIR_FIELDS, IndexedDataset
from mindspeed_llm.data.encoders import CHAT_TEMPLATE
from mindspeed_llm.data.index_cache import IndexCache, wait_for
from mindspeed_llm.data.on_the_fly import prepare_rows
from mindspeed_llm.data.pairs import PairDataset
from mindspeed_llm.data.plan import CHAT_FIELDS
from mindspeed_llm.data.prefixes import Parts, open_parts
from mindspeed_llm.data.report import check_data_agree, check_data_matches, report_path
from mindspeed_llm.data.templates import get_template
from mindspeed_llm.data.tokenizer import Tokenizer, load_tokenizer
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.training.raw_rows import cache_folder, data_of, preprocess_options, raw_folder
from mindspeed_llm.training.report import say
from mindspeed_llm.training.start import Start
from mindspeed_llm.training.together import done_by_each, done_by_one, same_for_all, works_for_all

CACHED_ROWS = 1_000_000  # smaller data sets: every rank draws its orders in the time it takes to find another's
VISIBLE_SECONDS = 60.0  # how long a shared file system may take to show a node what another has written


@dataclass(frozen=True)
class Rows:
    """What a run reads, and what that was made with.

    Attributes:
        parts: rows to train, validate and test on.
        tokenizer: of the model; None where none is found.
        template, enable_thinking: what the rows were laid out with, as far as their reports say.
        cache: folder for orders of rows; None where every rank draws its own.
        notes: what the user should know, as sentences.
    """

    parts: Parts
    tokenizer: Tokenizer | None
    template: str | None
    enable_thinking: str | None
    cache: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def pad_id(self) -> int:
        """Token behind a row's end."""
        if self.tokenizer is None:
            return 0
        return next(i for i in (self.tokenizer.pad_id, self.tokenizer.eos_id, 0) if i is not None)

    def index_cache(self, options: PosttrainOptions) -> IndexCache | None:
        """Where orders of rows are kept, None for data sets too small to gain by it."""
        each_node = options.data.no_shared_storage
        return None if self.cache is None else IndexCache(self.cache, works_for_all(each_node))


def open_rows(options: PosttrainOptions, start: Start) -> Rows:
    """The rows the options name, ready to be read by every rank. Collective.

    Raises:
        UsageError: no rows are named, or in contradicting ways.
        InputError: they are missing, damaged, made with another tokenizer or template, or not the same on all ranks.
    """
    data, folder = options.data, tokenizer_folder(options.tokenizer, start.base)
    notes: list[str] = []
    if options.raw_rows:
        prefix = Path(done_by_one(lambda: _prepared(options, folder), data.no_shared_storage))
        done_by_each(lambda: wait_for(report_path(prefix), VISIBLE_SECONDS))
        data = data_of(options, prefix)
    tokenizer = done_by_each(lambda: load_tokenizer(folder) if folder else None)

    def opened() -> Parts:
        parts = open_parts(data, PairDataset if options.prefers else IndexedDataset)
        _check_made(options, parts, tokenizer)
        return parts

    parts = done_by_each(opened)
    same_for_all(parts.fingerprint, "rows in its files", "copy the same files to every node")
    template, thinking = _made_with(parts)
    cache = None
    if len(parts.train.source) >= CACHED_ROWS:
        beside = None if options.raw_rows else parts.train.prefixes[0].parent
        cache = Path(done_by_one(lambda: str(cache_folder(options, beside)), data.no_shared_storage))
        notes.append(f"orders of rows are kept in {cache}")
    rows = Rows(parts, tokenizer, template, thinking, cache, [*parts.notes, *notes])
    check_resumed_template(start, rows)
    return rows


def _prepared(options: PosttrainOptions, tokenizer: str | None) -> str:
    """Prepare raw rows, or find them prepared; -> their prefix."""
    if tokenizer is None:
        raise UsageError("--tokenizer-name-or-path is missing: the HF folder whose tokenizer the rows are made with")
    wanted = preprocess_options(options, tokenizer)
    cache = cache_folder(options, raw_folder(options))
    with _logged():
        prepared = prepare_rows(wanted, cache, PAIR_FIELDS if options.prefers else CHAT_FIELDS)
    if not prepared.made:
        say(f"rows prepared by an earlier run: {prepared.prefix}, {prepared.report['rows']['written']:,} rows")
    return str(prepared.prefix.resolve())


@contextmanager
def _logged() -> Iterator[None]:
    """What preprocessing logs, printed as a run prints."""

    class Printer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(self.format(record))

    logger, printer = logging.getLogger("mindspeed_llm.data"), Printer()
    kept = logger.level
    logger.addHandler(printer)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(kept)
        logger.removeHandler(printer)


def _check_made(options: PosttrainOptions, parts: Parts, tokenizer: Tokenizer | None) -> None:
    """Refuse rows that this run cannot train on, or that were made for another model.

    Raises:
        InputError: another tokenizer, template or thinking mode; data sets that differ in them.
    """
    said = options.tokenizer
    reports = {
        str(prefix): report for file in parts.files for prefix, report in zip(file.prefixes, file.reports, strict=True)
    }
    named = said.prompt_type if said.prompt_type != CHAT_TEMPLATE else None
    digest = get_template(named, said.prompt_type_path).content_hash if named else None
    for prefix, report in reports.items():
        if tokenizer is not None:
            check_data_matches(
                report, tokenizer.content_hash, said.prompt_type, said.enable_thinking, digest, f"the data {prefix}"
            )
    check_data_agree(reports)


def _made_with(parts: Parts) -> tuple[str | None, str | None]:
    """(template, thinking mode) of the rows trained on; thinking "none" where data sets differ in it."""
    reports = [report for report in parts.files[0].reports if report is not None]
    if not reports:
        return None, None
    modes = {report.get("enable_thinking") for report in reports}
    return reports[0].get("template", {}).get("name"), modes.pop() if len(modes) == 1 else "none"


def check_resumed_template(start: Start, rows: Rows) -> None:
    """Refuse to continue an adapter on rows of another template than it has learnt; `InputError`."""
    recorded = start.resume.metadata if start.resume is not None else None
    if recorded is None or recorded.template is None or rows.template is None:
        return
    if (recorded.template, recorded.enable_thinking) != (rows.template, rows.enable_thinking):
        raise InputError(
            f"{start.resume.folder} was trained with template {recorded.template} (thinking "
            f"{recorded.enable_thinking}), the data were made with {rows.template} (thinking {rows.enable_thinking}); "
            "preprocess again"
        )


def text_end(options: PosttrainOptions, tokenizer: Tokenizer | None) -> int | None:
    """The token behind which --reset-attention-mask and --reset-position-ids begin anew; None without these flags.

    Raises:
        UsageError: the tokenizer names no such token, or there is no tokenizer.
    """
    if not (options.data.reset_attention_mask or options.data.reset_position_ids):
        return None
    if tokenizer is None or tokenizer.eos_id is None:
        raise UsageError(
            "--reset-attention-mask and --reset-position-ids look for the tokenizer's end-of-text token, and "
            f"{'no tokenizer was found' if tokenizer is None else 'it names none'}; give "
            "--tokenizer-name-or-path one that has it, or pack with --neat-pack"
        )
    return tokenizer.eos_id
