"""Pairs of a chosen and a rejected answer to the same prompt: files of the pairwise handlers, and their micro-batches.

A micro-batch of P pairs has 2 P sequences, the chosen ones first, then the rejected ones in the same order: both
answers of a pair are always computed together.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_llm.data.dataset import (
    PAIR_FIELDS,
    REQUIRED_FIELDS,
    Fields,
    IndexedDataset,
    Sample,
    check_same_rows,
    open_fields,
)
from mindspeed_llm.data.messages import SIDES
from mindspeed_llm.errors import InputError

Arrays = dict[str, Any]


class PairDataset(IndexedDataset):
    """The pairs of one or more output prefixes, one prefix after the other, read when asked for.

    A row is a dict: `chosen` and `rejected`, each a row as `IndexedDataset` has it, and `name`. Its length is that of
    its longer side, which is what padding and --seq-length go by.
    """

    REQUIRED = PAIR_FIELDS
    OPTIONAL = ()

    def _opened(self, prefix: Path) -> Fields:
        """The files of a prefix: on each side tokens and labels alike, as many pairs on both."""
        found = open_fields(prefix, self.REQUIRED, self.OPTIONAL)
        sides = [{name: file for name, file in found.items() if name.startswith(side)} for side in SIDES]
        for side in sides:
            check_same_rows(prefix, side)
        counts = [len(next(iter(side.values()))) for side in sides]
        if counts[0] != counts[1]:
            raise InputError(
                f"{prefix}: {counts[0]} chosen answers and {counts[1]} rejected ones; they are from different runs, "
                "preprocess again"
            )
        return found

    def _lengths(self, part: Fields) -> np.ndarray:
        """[pairs] int32, tokens of the longer side."""
        return np.maximum(*(part[f"{side}_input_ids"].lengths for side in SIDES))

    @property
    def neat_packed(self) -> bool:
        """False: pairs are never joined."""
        return False

    @property
    def may_be_packed(self) -> bool:
        """False: pairs are never joined."""
        return False

    def __getitem__(self, row: int) -> Sample:
        """Pair `row`: read-only arrays on the mapped files."""
        stored = self._fields(row)
        pair: Sample = {"name": stored["name"]}
        for side in SIDES:
            answer: Sample = {field: stored[f"{side}_{field}"] for field in REQUIRED_FIELDS}
            answer["attention_mask"] = np.ones(len(answer["input_ids"]), np.int32)
            pair[side] = answer | {"name": f"the {side} answer of {stored['name']}"}
        return pair


def in_pairs(collate: Callable[[Sequence[Sample]], Arrays]) -> Callable[[Sequence[Sample]], Arrays]:
    """A collate of rows as one of pairs: [P chosen, P rejected], with two entries more.

    `sequences` [b, s] int64 (or [1, s] of a flat layout): to which of the 2 P sequences a position belongs; behind the
    last row of a flat layout 2 P. `pairs`: P. A row that is no pair stands for both sides.
    """

    def both(rows: Sequence[Sample]) -> Arrays:
        batch = collate([row.get(side, row) for side in SIDES for row in rows])
        lengths, shape = batch["lengths"], batch["tokens"].shape
        numbers = np.arange(len(lengths) + 1)
        if "cu_seqlens" in batch:
            sequences = np.repeat(numbers, [*lengths, shape[1] - lengths.sum()])[None]
        else:
            sequences = np.broadcast_to(numbers[:-1, None], shape)
        return {**batch, "sequences": np.ascontiguousarray(sequences), "pairs": len(rows)}

    return both
