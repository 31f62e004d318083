"""Samples of every kind to tokens: which texts of a sample are encoded, and under which name."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mindspeed_llm.data.encode import IGNORE_INDEX, Encoded
from mindspeed_llm.data.encoders import Encoder
from mindspeed_llm.data.handlers import Handler
from mindspeed_llm.data.messages import SIDES, Conversation, Sample, Texts
from mindspeed_llm.data.rows import Row

if TYPE_CHECKING:
    from mindspeed_llm.data.tokenize_rows import Job

Parts = dict[str, Encoded]  # by field; "" is a sample's one row of tokens


def encode_samples(
    job: "Job", handler: Handler, encoder: Encoder, rows: Sequence[Row], samples: Sequence[Any]
) -> list[Parts]:
    """The tokens of each sample, by field.

    Args:
        rows: the row of each sample.
        samples: all of the handler's kind.
    """
    if handler.KIND == "chat":
        return [{"": row} for row in encoder.encode_rows(samples, job.limits, job.shape.mask_history)]
    if handler.KIND == "preference":
        return [dict(zip(SIDES, pair, strict=True)) for pair in encoder.encode_preferences(samples, job.limits)]
    if handler.KIND == "text":
        return _documents(job, encoder, samples)
    prompts = encoder.encode_prompts(samples, answers=handler.KIND == "answer" or not job.compat)
    found: list[Parts] = [{"": prompt} for prompt in prompts]
    for key in job.reading.additional_keys if handler.KIND == "answer" else ():
        texts = [_additional(key, row, sample) for row, sample in zip(rows, samples, strict=True)]
        for parts, ids in zip(found, encoder.encode_texts(texts), strict=True):
            parts[key] = Encoded(ids, [(0, len(ids))], [], len(ids))
    return found


def _additional(key: str, row: Row, sample: Sample) -> str:
    """Text of an additional field: the last answer for `labels`, else what the row's column holds."""
    if key == "labels" and isinstance(sample, Conversation):
        return sample.messages[-1]["content"]
    value = row.columns.get(key)
    return "" if value is None else str(value)


def _documents(job: "Job", encoder: Encoder, samples: Sequence[Texts]) -> list[Parts]:
    """Documents of running text, each with what its tokenizer puts around it."""
    texts = [text for sample in samples for text in sample.fields.values()]
    encoded = iter(encoder.tokenizer.encode_documents(texts))
    return [
        {key: _document(job, encoder, next(encoded), text) for key, text in sample.fields.items()} for sample in samples
    ]


def _document(job: "Job", encoder: Encoder, ids: list[int], text: str) -> Encoded:
    """A document's tokens: padded, ended and cut as asked. An empty text has none."""
    if not text or not ids:
        return Encoded([], [], [], 0)
    multiple, limit = job.pad_to_multiple_of, job.limits.seq_length
    ids = list(ids)
    full = len(ids) + int(job.limits.append_eod)
    if not job.compat and limit is not None:
        ids = ids[: limit - int(job.limits.append_eod)]
    trained = len(ids) + int(job.limits.append_eod)
    if job.compat:
        # upstream pads with an id beyond the table, a whole block where the length fits already, and ends after that
        ids += [encoder.tokenizer.vocab_size] * (multiple - len(ids) % multiple if multiple > 1 else 0)
        ids += [encoder.eos_id] * int(job.limits.append_eod)
    else:
        ids += [encoder.eos_id] * int(job.limits.append_eod)
        ids += [encoder.pad_id] * (-len(ids) % multiple)
    return Encoded(ids, [(0, trained)], [], max(full, len(ids)) if full <= trained else full)


def arrays(rows: Sequence[Encoded], eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and labels [sum of lengths] int32 of the rows, one after the other."""
    if not rows:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    ids = np.concatenate([np.asarray(row.ids, np.int32) for row in rows])
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    at = 0
    for row in rows:
        for start, stop in row.spans:
            labels[at + start : at + stop] = ids[at + start : at + stop]
        for position in row.eos_at:
            labels[at + position] = eos_id
        at += len(row.ids)
    return ids, labels
