"""The part of preprocessing that runs in worker processes: rows in, token arrays and an account of them out."""

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from mindspeed_llm.data.encode import Encoded, Limits
from mindspeed_llm.data.encoders import Encoder, answer_marks, make_encoder
from mindspeed_llm.data.handlers import BadRow, Handler, Reading, Unanswered, get_handler, needs_template
from mindspeed_llm.data.intake import TOO_MUCH_TEXT
from mindspeed_llm.data.messages import SIDES, Conversation, PlainTurns, Preference, Sample
from mindspeed_llm.data.rows import Row
from mindspeed_llm.data.sample_tokens import arrays, encode_samples
from mindspeed_llm.data.shaping import Shape
from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.errors import UsageError

JSON_KEY_HANDLERS = ("GeneralPretrainHandler", "SharegptPretrainHandler")
WITHOUT_TEMPLATE = "empty"  # template of handlers that lay rows out themselves
EXCERPT = 80  # characters of a dropped row that are reported


@dataclass(frozen=True)
class Job:
    """Everything a worker needs, in a form that travels between processes.

    Attributes:
        template: name of the prompt template; "hf" for the tokenizer's own, None for handlers that need none.
        map_keys: JSON text of the columns' names.
        system: system text of rows that bring none, before the template's own default.
        shape: what of a row is kept and trained.
        forms: name -> (handler, map_keys) of the rows that say a `form` of their own.
        compat: "upstream" for its tokens, None for this package's own.
        allow_control_tokens: control tokens in the text of users, systems and tools become tokens.
        reading: what handlers are told besides the names of columns.
        pad_to_multiple_of: documents of running text are filled up to a multiple of this length.
    """

    tokenizer: str
    template: str | None
    template_file: str | None
    enable_thinking: str
    handler: str
    map_keys: str
    limits: Limits
    system: str | None = None
    shape: Shape = Shape()
    forms: tuple[tuple[str, str, str], ...] = ()
    compat: str | None = None
    allow_control_tokens: bool = False
    reading: Reading = Reading()
    pad_to_multiple_of: int = 1


@dataclass(frozen=True)
class Place:
    """A row that is reported: where it stands and what about it."""

    file: str
    row: int
    note: str
    excerpt: str


@dataclass
class Field:
    """One output file's share of a chunk.

    Attributes:
        values: [sum of lengths] int32, sample after sample.
        lengths: of each sample; -1 where upstream ends a document without one.
    """

    values: np.ndarray
    lengths: list[int]


@dataclass
class Chunk:
    """Rows that have become tokens.

    Attributes:
        fields: what is written, by the name of the field; a mask of attention is not among them.
        ids, labels: [sum(lengths)] int32, all tokens of each sample, and their labels.
        lengths: tokens of each sample.
        read: rows that went in.
        dropped: rows without tokens to train on, `note` being the reason.
        left_out: rows that are well made and too long, or not answered, `note` being the reason.
        cut: rows that were shortened, `note` telling from and to how many tokens.
        untrained: rows in which no token is trained.
        odd_thoughts: rows with thought tags that the template does not recognise.
        remarks: rows about which there is something else to say, `note` being it.
    """

    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    lengths: list[int] = field(default_factory=list)
    fields: dict[str, Field] = field(default_factory=dict)
    read: int = 0
    dropped: list[Place] = field(default_factory=list)
    left_out: list[Place] = field(default_factory=list)
    cut: list[Place] = field(default_factory=list)
    untrained: list[Place] = field(default_factory=list)
    odd_thoughts: list[Place] = field(default_factory=list)
    remarks: list[Place] = field(default_factory=list)


@lru_cache(maxsize=1)
def tools(job: Job) -> tuple[Handler, Encoder]:
    """The handler and encoder of a job, made once per process."""
    handler = get_handler(job.handler, json.loads(job.map_keys), job.reading)
    marks = answer_marks(handler)
    template = "hf" if marks else job.template if needs_template(handler) else WITHOUT_TEMPLATE
    if template is None:
        raise UsageError(f"--handler-name {job.handler} needs --prompt-type, e.g. qwen3 (or hf)")
    if job.template is not None and not needs_template(handler) and not (marks and job.template == "hf"):
        raise UsageError(
            f"--prompt-type {job.template} has no effect with {job.handler}; leave it out, or name a handler of "
            "conversations with --handler-name"
        )
    file = job.template_file if needs_template(handler) else None
    encoder = make_encoder(
        template, file, load_tokenizer(job.tokenizer), job.enable_thinking, job.compat, job.allow_control_tokens, marks
    )
    return handler, encoder


@lru_cache(maxsize=1)
def form_handlers(job: Job) -> dict[str, Handler]:
    """The handlers of rows that say a form of their own, by its name."""
    return {name: get_handler(handler, json.loads(map_keys), job.reading) for name, handler, map_keys in job.forms}


def output_fields(handler: Handler) -> list[str]:
    """Names of the fields that a handler's samples become, a mask of attention included."""
    if handler.KIND == "preference":
        return [f"{side}_{name}" for side in SIDES for name in ("input_ids", "labels")]
    if handler.KIND == "text":
        named = handler.reading.json_keys
        return list(named) if type(handler).__name__ in JSON_KEY_HANDLERS else ["text"]
    more = list(handler.reading.additional_keys) if handler.KIND == "answer" else []
    return ["input_ids", "attention_mask", *(["labels"] if handler.KIND == "chat" else more)]


def tokenize_chunk(job: Job, rows: list[Row]) -> Chunk:
    """Samples, tokens and labels of some rows."""
    handler, encoder = tools(job)
    result = Chunk(read=len(rows))
    good: list[Row] = []
    samples: list[Sample] = []
    for row in rows:
        if row.fault is not None:
            (result.left_out if row.fault == TOO_MUCH_TEXT else result.dropped).append(_place(row, row.fault))
            continue
        own = handler if row.form is None else form_handlers(job)[row.form]
        try:
            made = own.samples(row.columns)
        except BadRow as reason:
            listing = result.left_out if isinstance(reason, Unanswered) else result.dropped
            listing.append(_place(row, str(reason)))
            continue
        samples += [with_system(sample, job.system) for sample in made]
        good += [row] * len(made)
    kept = _Kept(handler.KIND)
    for row, sample, parts in zip(good, samples, encode_samples(job, handler, encoder, good, samples), strict=True):
        _account(job, encoder, result, row, sample, parts, kept)
    result.fields = kept.fields(handler, encoder.eos_id)
    result.lengths = [sum(len(part.ids) for part in parts.values()) for parts in kept.rows]
    if "labels" in result.fields and handler.KIND == "chat":
        result.ids, result.labels = result.fields["input_ids"].values, result.fields["labels"].values
    else:
        result.ids, result.labels = arrays([part for parts in kept.rows for part in parts.values()], encoder.eos_id)
    return result


@dataclass
class _Kept:
    """Samples that are written: the kind of their handler, their parts, and where upstream left one out before one."""

    kind: str
    rows: list[dict[str, Encoded]] = field(default_factory=list)
    gaps: list[tuple[int, list[str]]] = field(default_factory=list)

    def fields(self, handler: Handler, eos_id: int) -> dict[str, Field]:
        """What is written of them."""
        found: dict[str, Field] = {}
        names = list(
            dict.fromkeys([name for parts in self.rows for name in parts] + [n for _, g in self.gaps for n in g])
        )
        for part in names:
            present = [parts[part] for parts in self.rows if part in parts]
            ids, labels = arrays(present, eos_id)
            lengths = [len(row.ids) for row in present]
            for place, of in reversed(self.gaps):
                if part in of:
                    lengths.insert(sum(part in parts for parts in self.rows[:place]), -1)
            prefix = f"{part}_" if part in SIDES else ""
            found[prefix + "input_ids" if part in ("", *SIDES) else part] = Field(ids, lengths)
            if (part == "" and handler.KIND == "chat") or part in SIDES:
                found[prefix + "labels"] = Field(labels, lengths)
        return found


def _account(
    job: Job, encoder: Encoder, result: Chunk, row: Row, sample: Sample, parts: dict[str, Encoded], kept: _Kept
) -> None:
    """Decide what becomes of a sample, and note it."""
    main = next(iter(parts.values()))
    fault = main.fault if len(parts) == 1 else next((part.fault for part in parts.values() if part.fault), "")
    if fault or not any(len(part.ids) for part in parts.values()):
        result.dropped.append(_place(row, fault or "no text at all"))
        return
    limit = job.limits.seq_length
    if job.compat and limit is not None and any(len(part.ids) >= limit for part in parts.values()):
        result.left_out.append(_place(row, "too long for --seq-length, as upstream leaves them out"))
        kept.gaps.append((len(kept.rows), list(parts)))
        return
    shaped = _shaped(job.shape, sample, parts)
    if shaped is None:
        result.left_out.append(_place(row, f"longer than --max-length {job.shape.max_length}"))
        return
    parts = shaped
    main = next(iter(parts.values()))
    trained = any(stop > start for part in parts.values() for start, stop in part.spans)
    trains = not isinstance(sample, Conversation) or kept.kind == "chat"
    if trains and not trained:
        if not job.compat:
            result.left_out.append(_place(row, "no token of it is trained"))
            return
        result.untrained.append(_place(row, "no token of it is trained"))
    kept.rows.append({name: part for name, part in parts.items() if len(part.ids)})
    if len(main.ids) < main.full_length:
        result.cut.append(_place(row, f"{main.full_length} -> {len(main.ids)} tokens"))
    if isinstance(sample, Conversation):
        answers = [message["content"] for message in sample.messages if message["role"] == "assistant"]
        if any(map(encoder.misses_thought, answers)):
            result.odd_thoughts.append(_place(row, "thought tags not written as the template's"))
        if "" in answers or any(map(str.isspace, answers)):
            result.remarks.append(_place(row, "an answer is empty"))
        if sample.unanswered:
            result.remarks.append(_place(row, "messages after the last answer are left out"))
    if main.note:
        result.remarks.append(_place(row, main.note))


def _shaped(shape: Shape, sample: Sample, parts: dict[str, Encoded]) -> dict[str, Encoded] | None:
    """The parts of a sample as they are kept; None when one of them is to be left out for its length."""
    if not isinstance(sample, (Conversation, PlainTurns)):
        shape = Shape(shape.max_length, shape.strategy)  # there is no history or prompt apart
    found: dict[str, Encoded] = {}
    for name, part in parts.items():
        # beside a prompt, other parts are texts of their own (R1 handlers)
        kept = shape.apply(part) if name == "" or "" not in parts else part
        if kept is None:
            return None
        found[name] = kept
    return found


def with_system(sample: Sample, system: str | None) -> Sample:
    """The sample, with `system` for its system text where it brings none."""
    if isinstance(sample, Preference):
        return replace(sample, prompt=with_system(sample.prompt, system))
    if not system or not isinstance(sample, Conversation) or sample.system:
        return sample
    return replace(sample, system=system)


def _place(row: Row, note: str) -> Place:
    text = row.excerpt or json.dumps(row.columns, ensure_ascii=False, default=str)
    # half a surrogate pair, in a column's name, cannot be written
    return Place(row.file, row.number, note, text[:EXCERPT].encode("utf-8", "replace").decode())
