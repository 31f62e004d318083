"""How long raw rows will be, told from the first of them: what a plan needs before anything is prepared."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from mindspeed_llm.data.encode import IGNORE_INDEX
from mindspeed_llm.data.intake import in_chunks
from mindspeed_llm.data.messages import SIDES
from mindspeed_llm.data.plan import Plan
from mindspeed_llm.data.readers import Fault
from mindspeed_llm.data.rows import Row, text_size
from mindspeed_llm.data.sources import Source
from mindspeed_llm.data.tokenize_rows import Chunk, tokenize_chunk
from mindspeed_llm.errors import InputError

SAMPLED = 2000
"""Rows that are read: half a second of work."""
CHARACTERS = 1 << 23
"""Of text that is read, where rows are long: some seconds of work."""


@dataclass(frozen=True)
class Sampled:
    """Some rows of a data set.

    Attributes:
        lengths: [rows] tokens of each; of a pair those of its longer side.
        tokens, trained: of all these rows, of both sides of a pair.
        every: whether these are all the rows that the sources hold.
        whole: about how many rows take part in all; None where that cannot be told quickly.
    """

    lengths: np.ndarray
    tokens: int
    trained: int
    every: bool
    whole: int | None


class Beginning:
    """The first rows of a source, however many of it take part.

    Attributes:
        every: whether there were no more; known once they have been read.
    """

    def __init__(self, source: Source, rows: int, characters: int) -> None:
        """At most so many rows, and no further one behind so many characters."""
        self.source, self.most, self.characters = source, max(1, rows), characters
        self.every = False

    def rows(self) -> Iterator[Row]:
        """The rows. `every` is set behind the last."""
        there, room = self.source.in_order(), self.characters
        for row in islice(there, self.most):
            yield row
            room -= _characters(row)
            if room < 0:
                break
        self.every = next(there, None) is None


def _characters(row: Row) -> int:
    """Of all its texts; of one that is none as many as it shows."""
    try:
        return text_size(row.columns)
    except Fault:
        return len(row.excerpt)


def sample_lengths(plan: Plan, most: int = SAMPLED, characters: int = CHARACTERS) -> Sampled:
    """Tokenise the first rows of every source as preprocessing would; nothing is written, and no file read to its end.

    Args:
        most: rows, of all sources together in proportion to those that take part of each (where that can be told
            without reading them; else alike). characters: of text, divided likewise.

    Raises:
        InputError: the rows cannot be read, or none of those read can be trained on.
    """
    sources = plan.mixture.sources
    counts = plan.mixture.estimates()
    shares = np.array(counts if counts and any(counts) else [1] * len(sources), float)
    shares /= shares.sum()
    beginnings = [
        Beginning(source, round(most * share), int(characters * share))
        for source, share in zip(sources, shares.tolist(), strict=True)
    ]
    lengths: list[int] = []
    tokens = trained = 0
    reasons: set[str] = set()
    first = (row for one in beginnings for row in one.rows())
    for rows in in_chunks(first, plan.options.max_chars_per_row):
        chunk = tokenize_chunk(plan.job, rows)
        lengths += row_lengths(chunk)
        tokens += len(chunk.ids)
        trained += int(np.count_nonzero(chunk.labels != IGNORE_INDEX))
        reasons |= {place.note for place in (*chunk.dropped, *chunk.left_out)}
    if not lengths:
        why = "; ".join(sorted(reasons)) or "there are none"
        raise InputError(f"none of the first {most:,} rows can be trained on: {why}")
    every = all(one.every for one in beginnings)
    return Sampled(np.array(lengths), tokens, trained, every, None if counts is None else sum(counts))


def row_lengths(chunk: Chunk) -> list[int]:
    """Tokens of each row; of a pair those of its longer side."""
    sides = [chunk.fields[name].lengths for side in SIDES if (name := f"{side}_input_ids") in chunk.fields]
    return [max(pair) for pair in zip(*sides, strict=True)] if sides else chunk.lengths
