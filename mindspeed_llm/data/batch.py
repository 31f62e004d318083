"""Rows to the arrays of one micro-batch: cut, padded on the right, labels shifted.

b rows of a micro-batch, s length after padding. Labels leave here already shifted: `labels[t]` is the token that
follows `tokens[t]`, so the loss compares position t of the logits with position t of the labels.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np

from mindspeed_llm.data.cutting import cut_turns, favour_shorter
from mindspeed_llm.data.dataset import RowSource
from mindspeed_llm.data.encode import IGNORE_INDEX
from mindspeed_llm.errors import InputError


class CutRule(Enum):
    """What happens to a row longer than the model's sequence length."""

    TURNS = "turns"  # every turn's prompt and answer are shortened in proportion; turns beyond are left out
    HARD = "hard"  # what stands beyond the limit is cut off (--cut-max-seqlen)
    REFUSE = "refuse"  # the run stops (--no-cut-token)


def collate(
    rows: Sequence[Mapping[str, Any]],
    pad_id: int,
    seq_length: int,
    pad_to_multiple_of: int = 1,
    pad_to_longest: bool = False,
    cut: CutRule = CutRule.TURNS,
) -> dict[str, np.ndarray]:
    """One micro-batch.

    Args:
        rows: dicts with `input_ids` and `labels` [length], labels unshifted (-100 = not trained); `name` in errors.
        pad_id: token behind a row's end.
        seq_length: length beyond which rows are cut, and to which they are padded.
        pad_to_longest: pad to the longest row of the micro-batch instead of to `seq_length`.
        pad_to_multiple_of: the padded length is rounded up to a multiple of it, in both cases.
        cut: see `CutRule`.

    Returns:
        tokens [b, s] int64, labels [b, s] int64 (shifted, -100 = not trained), loss_mask [b, s] float32 (1 where a
        label is trained), lengths [b] int64 (tokens of each row before padding).

    Raises:
        InputError: a row is too long and `cut` is REFUSE.
    """
    cut_rows = [cut_row(row, seq_length, cut) for row in rows]
    lengths = np.array([len(ids) for ids, _ in cut_rows], dtype=np.int64)
    longest = max(int(lengths.max(initial=0)), 1)
    width = longest if pad_to_longest else seq_length
    width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    tokens = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
    for i, (ids, row_labels) in enumerate(cut_rows):
        tokens[i, : len(ids)] = ids
        labels[i, : max(len(ids) - 1, 0)] = row_labels[1:]
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (labels != IGNORE_INDEX).astype(np.float32),
        "lengths": lengths,
    }


def collate_flat(
    rows: Sequence[Mapping[str, Any]],
    pad_id: int,
    seq_length: int,
    pad_to_multiple_of: int = 1,
    cut: CutRule = CutRule.TURNS,
    attention_end: int | None = None,
    position_end: int | None = None,
) -> dict[str, np.ndarray]:
    """One micro-batch without padding between rows: all rows one after the other in a single sequence.

    A neatly packed row is taken apart into the rows it was made of. Attention must not cross the bounds in
    `cu_seqlens`, and positions start anew at each.

    Args:
        rows, pad_id, cut: as `collate` has them; `attention_mask` numbers the rows of a neat pack from 1, padding 0.
        seq_length: longest row; the sequence itself is as long as its rows together.
        pad_to_multiple_of: the sequence is filled up to a multiple of it; the filling is a segment of its own.
        attention_end, position_end: token behind which attention, or positions, start anew within a row too, as
            Megatron's --reset-attention-mask and --reset-position-ids have it; None for none.

    Returns:
        tokens, labels [1, s] int64 (labels shifted within each row, -100 = not trained), loss_mask [1, s] float32,
        position_ids [1, s] int64, cu_seqlens [segments + 1] int32 (where each begins, and the end), max_seqlen []
        int32 (tokens of the longest segment), lengths [rows] int64.

    Raises:
        InputError: a row is too long and `cut` is REFUSE.
    """
    parts = [part for row in rows for part in _segments(row, seq_length, cut)]
    lengths = np.array([len(ids) for ids, _ in parts], dtype=np.int64)
    total = int(lengths.sum())
    width = -(-max(total, 1) // pad_to_multiple_of) * pad_to_multiple_of
    tokens = np.full(width, pad_id, dtype=np.int64)
    labels = np.full(width, IGNORE_INDEX, dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths), [width] if width > total else []]).astype(np.int32)
    for (ids, row_labels), begin in zip(parts, bounds.tolist(), strict=False):
        tokens[begin : begin + len(ids)] = ids
        labels[begin : begin + max(len(ids) - 1, 0)] = row_labels[1:]
    starts = _divided(bounds, tokens[:total], position_end).astype(np.int64)
    positions = np.arange(width, dtype=np.int64) - np.repeat(starts[:-1], np.diff(starts))
    bounds = _divided(bounds, tokens[:total], attention_end)
    return {
        "tokens": tokens[None],
        "labels": labels[None],
        "loss_mask": (labels != IGNORE_INDEX).astype(np.float32)[None],
        "position_ids": positions[None],
        "cu_seqlens": bounds,
        "max_seqlen": np.array(np.diff(bounds).max(initial=0), dtype=np.int32),
        "lengths": lengths,
    }


def _divided(bounds: np.ndarray, tokens: np.ndarray, end: int | None) -> np.ndarray:
    """`bounds` and those behind each token `end`, in order; of a run of such tokens (padding) the last one counts."""
    if end is None:
        return bounds
    ends = np.append(tokens, -1) == end
    return np.union1d(bounds, np.flatnonzero(ends[:-1] & ~ends[1:]) + 1).astype(bounds.dtype)


def _segments(row: Mapping[str, Any], seq_length: int, cut: CutRule) -> list[tuple[np.ndarray, np.ndarray]]:
    """(input_ids, labels) of the rows in a row: itself, or those of a neat pack without its padding."""
    numbers = np.asarray(row.get("attention_mask", 1))
    if int(numbers.max(initial=0)) <= 1 and int(numbers.min(initial=1)) == 1:
        return [cut_row(row, seq_length, cut)]
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    parts = []
    for number in range(1, int(numbers.max(initial=0)) + 1):
        inside = numbers == number
        name = f"row {number} in {row.get('name', 'a row')}"
        parts.append(cut_row({"input_ids": ids[inside], "labels": labels[inside], "name": name}, seq_length, cut))
    return parts


def cut_row(row: Mapping[str, Any], seq_length: int, cut: CutRule) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, labels) of a row, both [min(length, seq_length)] or shorter, cut where they are longer.

    TURNS keeps of each turn what `favour_shorter` gives it of the room left; the turns are read from the labels. A
    row without trained tokens, or of several packed rows with numbers in their attention mask, is cut hard.
    """
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    if len(ids) <= seq_length:
        return ids, labels
    if cut is CutRule.REFUSE:
        raise InputError(
            f"{row.get('name', 'a row')} has {len(ids)} tokens, --seq-length is {seq_length} and --no-cut-token "
            "forbids to cut it; raise --seq-length or preprocess with one"
        )
    packed = int(np.max(row.get("attention_mask", 1), initial=0)) > 1
    turns = [] if cut is CutRule.HARD or packed else turn_bounds(labels)
    if not turns:
        return ids[:seq_length], labels[:seq_length]
    positions = [(list(range(begin, answer)), list(range(answer, end))) for begin, answer, end in turns]
    kept = [p for source, target in cut_turns(positions, seq_length, favour_shorter) for p in (*source, *target)]
    return ids[kept], labels[kept]


def turn_bounds(labels: np.ndarray) -> list[tuple[int, int, int]]:
    """(begin, first trained token, end) of each turn: a run of untrained labels and the trained run behind it.

    Untrained tokens behind the last trained run belong to that turn's end. Empty when nothing is trained.
    """
    trained = labels != IGNORE_INDEX
    edges = np.diff(trained.astype(np.int8), prepend=0)
    answers = np.flatnonzero(edges == 1)
    ends = np.flatnonzero(edges == -1).tolist()
    if trained.size and trained[-1]:
        ends.append(len(labels))
    ends[-1:] = [len(labels)] if ends else []
    begins = [0, *ends[:-1]]
    return [(b, int(a), int(e)) for b, a, e in zip(begins, answers, ends, strict=True)] if len(answers) else []


def cut_count(source: RowSource, seq_length: int) -> int:
    """How many rows of a data set are longer than `seq_length`, told from their lengths alone."""
    return int(np.count_nonzero(np.asarray(source.lengths) > seq_length))


def first_overlong(source: RowSource, seq_length: int) -> int | None:
    """The first row longer than `seq_length`, None when all fit."""
    too_long = np.flatnonzero(np.asarray(source.lengths) > seq_length)
    return int(too_long[0]) if too_long.size else None
