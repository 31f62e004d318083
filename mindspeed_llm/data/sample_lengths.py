"""How long raw rows will be, told from the first of them: what a plan needs before anything is prepared."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data.encode import IGNORE_INDEX
from mindspeed_llm.data.intake import in_chunks
from mindspeed_llm.data.messages import SIDES
from mindspeed_llm.data.on_the_fly import check_fields
from mindspeed_llm.data.plan import Plan, make_plan
from mindspeed_llm.data.rows import Row
from mindspeed_llm.data.sources import Mixture
from mindspeed_llm.data.tokenize_rows import Chunk, tokenize_chunk
from mindspeed_llm.errors import InputError

SAMPLED = 2000
"""Rows that are read: half a second of work."""


@dataclass(frozen=True)
class Sampled:
    """Some rows of a data set.

    Attributes:
        lengths: [rows] tokens of each; of a pair those of its longer side.
        tokens, trained: of all these rows, of both sides of a pair.
        whole: about how many rows there are in all; None where that cannot be told quickly.
    """

    lengths: np.ndarray
    tokens: int
    trained: int
    whole: int | None


def sample_lengths(options: PreprocessOptions, fields: Sequence[str], most: int = SAMPLED) -> Sampled:
    """Tokenise up to `most` rows as preprocessing would; nothing is written.

    Args:
        options: of preprocessing. fields: that the run reads.

    Raises:
        UsageError: as preprocessing would, and for rows of another kind than wanted.
        InputError: the rows cannot be read, or none of those read can be trained on.
    """
    plan = make_plan(options)
    check_fields(plan, fields)
    lengths: list[int] = []
    tokens = trained = 0
    reasons: set[str] = set()
    for rows in in_chunks(first_rows(plan, most), options.max_chars_per_row):
        chunk = tokenize_chunk(plan.job, rows)
        lengths += row_lengths(chunk)
        tokens += len(chunk.ids)
        trained += int(np.count_nonzero(chunk.labels != IGNORE_INDEX))
        reasons |= {place.note for place in (*chunk.dropped, *chunk.left_out)}
    if not lengths:
        why = "; ".join(sorted(reasons)) or "there are none"
        raise InputError(f"none of the first {most:,} rows can be trained on: {why}")
    return Sampled(np.array(lengths), tokens, trained, plan.mixture.estimate())


def first_rows(plan: Plan, most: int) -> Iterator[Row]:
    """The first rows of every source, in proportion to its size where sizes can be told quickly."""
    sources = plan.mixture.sources
    sizes = [Mixture([source]).estimate() for source in sources]
    known = [size or 0 for size in sizes] if None not in sizes and any(sizes) else [1] * len(sources)
    for source, size in zip(sources, known, strict=True):
        yield from islice(source.rows(), max(1, round(most * size / sum(known))))


def row_lengths(chunk: Chunk) -> list[int]:
    """Tokens of each row; of a pair those of its longer side."""
    sides = [chunk.fields[name].lengths for side in SIDES if (name := f"{side}_input_ids") in chunk.fields]
    return [max(pair) for pair in zip(*sides, strict=True)] if sides else chunk.lengths
