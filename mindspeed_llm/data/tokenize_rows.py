"""The part of preprocessing that runs in worker processes: rows in, token arrays and an account of them out."""

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess

import numpy as np

from mindspeed_llm.data.encode import IGNORE_INDEX, ChatEncoder, Conversation, Encoded, Limits
from mindspeed_llm.data.handlers import BadRow, Handler, get_handler
from mindspeed_llm.data.intake import TOO_MUCH_TEXT
from mindspeed_llm.data.rows import Row
from mindspeed_llm.data.shaping import Shape
from mindspeed_llm.data.templates import get_template
from mindspeed_llm.data.tokenizer import load_tokenizer

EXCERPT = 80  # characters of a dropped row that are reported


@dataclass(frozen=True)
class Job:
    """Everything a worker needs, in a form that travels between processes.

    Attributes:
        map_keys: JSON text of the columns' names.
        system: system text of rows that bring none, before the template's own default.
        shape: what of a row is kept and trained.
        forms: name -> (handler, map_keys) of the rows that say a `form` of their own.
    """

    tokenizer: str
    template: str
    template_file: str | None
    enable_thinking: str
    handler: str
    map_keys: str
    limits: Limits
    system: str | None = None
    shape: Shape = Shape()
    forms: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Place:
    """A row that is reported: where it stands and what about it."""

    file: str
    row: int
    note: str
    excerpt: str


@dataclass
class Chunk:
    """Rows that have become tokens.

    Attributes:
        ids, labels: [sum(lengths)] int32, row after row.
        lengths: tokens of each row.
        read: rows that went in.
        dropped: rows without tokens to train on, `note` being the reason.
        left_out: rows that are well made and too long, `note` being the reason.
        cut: rows that were shortened, `note` telling from and to how many tokens.
        untrained: rows in which no token is trained.
        odd_thoughts: rows with thought tags that the template does not recognise.
    """

    ids: np.ndarray
    labels: np.ndarray
    lengths: list[int]
    read: int = 0
    dropped: list[Place] = field(default_factory=list)
    left_out: list[Place] = field(default_factory=list)
    cut: list[Place] = field(default_factory=list)
    untrained: list[Place] = field(default_factory=list)
    odd_thoughts: list[Place] = field(default_factory=list)


@lru_cache(maxsize=1)
def tools(job: Job) -> tuple[Handler, ChatEncoder]:
    """The handler and encoder of a job, made once per process."""
    template = get_template(job.template, job.template_file)
    encoder = ChatEncoder(template, load_tokenizer(job.tokenizer), job.enable_thinking)
    return get_handler(job.handler, json.loads(job.map_keys)), encoder


@lru_cache(maxsize=1)
def form_handlers(job: Job) -> dict[str, Handler]:
    """The handlers of rows that say a form of their own, by its name."""
    return {name: get_handler(handler, json.loads(map_keys)) for name, handler, map_keys in job.forms}


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation, with `system` for its system text where it brings none."""
    return replace(conversation, system=system) if system and not conversation.system else conversation


def tokenize_chunk(job: Job, rows: list[Row]) -> Chunk:
    """Conversations, tokens and labels of some rows."""
    handler, encoder = tools(job)
    result = Chunk(np.zeros(0, np.int32), np.zeros(0, np.int32), [], read=len(rows))
    good: list[Row] = []
    conversations: list[Conversation] = []
    for row in rows:
        if row.fault is not None:
            (result.left_out if row.fault == TOO_MUCH_TEXT else result.dropped).append(_place(row, row.fault))
            continue
        own = handler if row.form is None else form_handlers(job)[row.form]
        try:
            conversations.append(with_system(own.conversation(row.columns), job.system))
            good.append(row)
        except BadRow as reason:
            result.dropped.append(_place(row, str(reason)))
    encoded = encoder.encode_rows(conversations, job.limits)
    kept: list[Encoded] = []
    for row, conversation, tokens in zip(good, conversations, encoded, strict=True):
        if not tokens.ids:
            result.dropped.append(_place(row, "no text at all"))
            continue
        shaped = job.shape.apply(tokens)
        if shaped is None:
            result.left_out.append(_place(row, f"longer than --max-length {job.shape.max_length}"))
            continue
        tokens = shaped
        kept.append(tokens)
        if len(tokens.ids) < tokens.full_length:
            result.cut.append(_place(row, f"{tokens.full_length} -> {len(tokens.ids)} tokens"))
        if not any(stop > start for start, stop in tokens.spans):
            result.untrained.append(_place(row, "no token of it is trained"))
        if any(encoder.template.misses_thought(m["content"]) for m in conversation.messages[1::2]):
            result.odd_thoughts.append(_place(row, "thought tags not written as the template's"))
    result.lengths = [len(tokens.ids) for tokens in kept]
    result.ids, result.labels = _arrays(kept, encoder.eos_id)
    return result


def tokenize_all(job: Job, chunks: Iterator[list[Row]], workers: int) -> Iterator[Chunk]:
    """All rows, chunk by chunk in their order, whatever the number of workers; few chunks are in memory at once."""
    with _executor(workers) as executor:
        waiting = []
        try:
            while True:
                while len(waiting) <= 2 * workers and (chunk := next(chunks, None)):
                    waiting.append(executor.submit(tokenize_chunk, job, chunk))
                if not waiting:
                    return
                yield waiting.pop(0).result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _executor(workers: int) -> Executor:
    """One worker is a thread beside the reader, and tokenises on all cores; more are processes with one core each."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    """Keep the tokenizer library of a worker process to its own core, and end with the parent, however it ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_after, args=(parent_process(),), daemon=True).start()


def _exit_after(parent: BaseProcess | None) -> None:
    """Leave this process as soon as its parent has gone: a killed parent cannot say goodbye."""
    if parent is not None:
        parent.join()
        os._exit(1)


def _arrays(rows: list[Encoded], eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and labels [sum of lengths] int32 of the rows, one after the other."""
    total = sum(len(row.ids) for row in rows)
    ids = np.fromiter(chain.from_iterable(row.ids for row in rows), np.int32, total)
    labels = np.full(total, IGNORE_INDEX, np.int32)
    at = 0
    for row in rows:
        for start, stop in row.spans:
            labels[at + start : at + stop] = ids[at + start : at + stop]
        for position in row.eos_at:
            labels[at + position] = eos_id
        at += len(row.ids)
    return ids, labels


def _place(row: Row, note: str) -> Place:
    text = row.excerpt or json.dumps(row.columns, ensure_ascii=False, default=str)
    return Place(row.file, row.number, note, text[:EXCERPT])
