"""From unpacked rows to the files of training: copied into the parts of a split, joined into packs.

Both read the rows' own files, a block or a pack at a time, so that memory does not grow with the tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindspeed_llm.data.encode import IGNORE_INDEX
from mindspeed_llm.data.indexed_file import IndexedFileWriter, RowFile
from mindspeed_llm.data.packing import greedy_packs, pack_rows


def copy_rows(source: Path, target: Path, chosen: np.ndarray) -> None:
    """Write the rows of a file that are marked in `chosen` [rows] bool to another, in their order."""
    with RowFile(source) as rows, IndexedFileWriter(target, rows.index.dtype) as writer:
        for begin, end in rows.blocks():
            lengths = rows.lengths[begin:end]
            kept = chosen[begin:end]
            writer.add(rows.rows(begin, end)[np.repeat(kept, lengths)], lengths[kept].tolist())


@dataclass(frozen=True)
class Packing:
    """How rows are joined.

    Attributes:
        length: tokens of every sequence.
        neat: the joined rows are numbered in the attention mask.
        pad_id: token behind the last row.
        seed: order of the packs.
        upstream: upstream's order and its capacity, one token less than the length.
        parts: parts of the rows that are packed each on its own (upstream's order only).
    """

    length: int
    neat: bool
    pad_id: int
    seed: int
    upstream: bool = False
    parts: int = 1

    @property
    def capacity(self) -> int:
        """Tokens of rows that a sequence holds at most."""
        return self.length - int(self.upstream)


@dataclass(frozen=True)
class Packed:
    """What packing made: sequences, and tokens of rows in them."""

    sequences: int
    tokens: int
    length: int

    @property
    def fill(self) -> float:
        """Share of the sequences that is no padding."""
        return self.tokens / (self.sequences * self.length) if self.sequences else 0.0


def pack_files(sources: Mapping[str, Path], targets: Mapping[str, Path], packing: Packing) -> Packed:
    """Join the rows of `input_ids` and `labels` into sequences of one length, and write their attention mask."""
    with ExitStack() as stack:
        ids, labels = (stack.enter_context(RowFile(sources[field])) for field in ("input_ids", "labels"))
        writers = {field: stack.enter_context(IndexedFileWriter(target)) for field, target in targets.items()}
        sequences = 0
        for pack in _packs(np.asarray(ids.lengths), packing):
            sequences += 1
            lengths = ids.lengths[pack]
            made = {
                "input_ids": _joined([ids.row(row) for row in pack], packing.length, packing.pad_id),
                "labels": _joined([labels.row(row) for row in pack], packing.length, IGNORE_INDEX),
                "attention_mask": _mask(lengths, packing),
            }
            for field, writer in writers.items():
                writer.add(made[field], [packing.length])
        return Packed(sequences, int(ids.lengths.sum(dtype=np.int64)), packing.length)


def _packs(lengths: np.ndarray, packing: Packing) -> Iterator[list[int]]:
    """Row numbers of each sequence."""
    if not packing.upstream:
        for pack in pack_rows(lengths, packing.capacity, packing.seed):
            yield pack.tolist()
        return
    part = max(len(lengths) // packing.parts, 1)
    for begin in range(0, len(lengths), part):
        for rows in greedy_packs(lengths[begin : begin + part].tolist(), packing.capacity):
            yield [begin + row for row in rows]


def _joined(rows: list[np.ndarray], length: int, filler: int) -> np.ndarray:
    """The rows one after the other [length], the rest filled up."""
    sequence = np.full(length, filler, np.int32)
    tokens = np.concatenate(rows)
    sequence[: len(tokens)] = tokens
    return sequence


def _mask(lengths: np.ndarray, packing: Packing) -> np.ndarray:
    """Attention mask [length]: all ones; or, neat, the number of the row in the pack from 1, padding 0."""
    if not packing.neat:
        return np.ones(packing.length, np.int32)
    numbers = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    return np.pad(numbers, (0, packing.length - len(numbers)))
