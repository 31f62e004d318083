"""Rows as the model gets them: their text with the trained tokens marked, on a terminal or in a page."""

import html
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np

IGNORE_INDEX = -100
GREEN, GREY, RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"  # around trained text where there are no colours
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens that are all trained or all not, as text."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Shown:
    """A row to be shown.

    Attributes:
        title: what it is.
        tokens, trained: how many tokens it has, and how many of them are trained.
        segments: its text.
        notes: what the text does not tell.
    """

    title: str
    tokens: int
    trained: int
    segments: list[Segment]
    notes: list[str]


def show_row(title: str, ids: np.ndarray, labels: np.ndarray | None, decode: Decode) -> Shown:
    """A row made ready to be shown.

    Args:
        ids: [length] token ids.
        labels: [length], -100 where nothing is trained; None when every token is trained (running text).
    """
    ids = np.asarray(ids)
    trained = np.ones(len(ids), bool) if labels is None else np.asarray(labels) != IGNORE_INDEX
    padding = _padding(ids, trained)
    edges = np.flatnonzero(np.diff(trained)) + 1
    bounds = [0, *edges.tolist(), len(ids)] if len(ids) else [0]
    bounds[-1] -= padding
    segments = [
        Segment(decode(ids[begin:end].tolist()), bool(trained[begin]))
        for begin, end in zip(bounds, bounds[1:], strict=False)
        if end > begin
    ]
    notes = [f"{padding} times {decode([int(ids[-1])])!r} follow"] if padding else []
    if labels is not None:
        other = np.flatnonzero(trained & (np.asarray(labels) != ids))
        notes += [
            f"token {place} {decode([int(ids[place])])!r} has the label {decode([int(labels[place])])!r}"
            for place in other[:5].tolist()
        ]
    return Shown(title, len(ids), int(trained.sum()), segments, notes)


def _padding(ids: np.ndarray, trained: np.ndarray) -> int:
    """Untrained tokens at the end that are all the same, when there are more than two; else 0."""
    other = np.flatnonzero(trained | (ids != ids[-1])) if len(ids) else np.zeros(0, int)
    count = len(ids) - (int(other[-1]) + 1 if other.size else 0)
    return count if count > 2 else 0


def as_text(row: Shown, colour: bool) -> str:
    """A row for a terminal: trained text green, the rest grey; in brackets where colours are not wanted."""
    before, after = (GREEN, RESET) if colour else (OPEN, CLOSE)
    plain_before, plain_after = (GREY, RESET) if colour else ("", "")
    parts = []
    for segment in row.segments:
        begin, end = (before, after) if segment.trained else (plain_before, plain_after)
        # a trained line break is a token like any other and would else not be seen
        text = segment.text.replace("\n", "↵\n") if segment.trained else segment.text
        # colours are set anew on every line: pagers forget them at line ends
        parts.append(begin + (f"{end}\n{begin}".join(text.split("\n")) if colour else text) + end)
    share = row.trained / row.tokens if row.tokens else 0.0
    head = f"--- {row.title}: {row.tokens} tokens, {row.trained} trained ({share:.0%})"
    return "\n".join([head, "".join(parts), *(f"note: {note}" for note in row.notes)])


def as_html(row: Shown) -> str:
    """A row for a page: the trained text in `<mark>`."""
    text = "".join(
        f"<mark>{html.escape(segment.text.replace(chr(10), '↵' + chr(10)))}</mark>"
        if segment.trained
        else html.escape(segment.text)
        for segment in row.segments
    )
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in row.notes)
    head = f"{html.escape(row.title)} · {row.tokens:,} tokens, {row.trained:,} trained"
    return f"<figure><figcaption>{head}</figcaption><pre>{text}</pre>{notes}</figure>"


def wants_colour(stream: TextIO = sys.stdout) -> bool:
    """Whether to colour: on a terminal, unless NO_COLOR is set; FORCE_COLOR colours everywhere."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()
