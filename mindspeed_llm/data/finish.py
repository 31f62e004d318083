"""From unpacked rows to the files of training: divided into parts by their content, joined into packs.

Both read the rows' own files, a block or a pack at a time, so that memory does not grow with the tokens. Per row there
are 8 bytes of content hash, and 1 of its part.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindspeed_llm.data.encode import IGNORE_INDEX
from mindspeed_llm.data.indexed_file import IndexedFile, IndexedFileWriter
from mindspeed_llm.data.packing import greedy_packs, pack_rows

BLOCK_TOKENS = 1 << 20  # tokens read at once
PARTS = ("train", "valid", "test")
HASHES = float(1 << 64)


class RowFile:
    """One field of rows that lie one after the other, read without mapping: what is read does not stay in memory."""

    def __init__(self, prefix: Path) -> None:
        self.index = IndexedFile(prefix)
        self.lengths = self.index.lengths
        self.handle = os.open(f"{prefix}.bin", os.O_RDONLY)

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, number: int) -> np.ndarray:
        """Row `number` [length]."""
        return self.rows(number, number + 1)

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` up to `end`, one after the other [sum of their lengths]."""
        width = self.index.dtype.itemsize
        size = int(self.lengths[begin:end].sum(dtype=np.int64)) * width
        if not size:
            return np.zeros(0, self.index.dtype)
        return np.frombuffer(os.pread(self.handle, size, int(self.index.offsets[begin])), self.index.dtype)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(begin, end) of runs of rows of about `BLOCK_TOKENS` together."""
        begin = tokens = 0
        for row, length in enumerate(self.lengths):
            if tokens and tokens + length > BLOCK_TOKENS:
                yield begin, row
                begin, tokens = row, 0
            tokens += int(length)
        if begin < len(self):
            yield begin, len(self)

    def close(self) -> None:
        """Let the file go."""
        os.close(self.handle)

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def content_hashes(ids: np.ndarray, lengths: Iterator[int] | list[int]) -> list[int]:
    """64-bit hash of each row's token ids; rows stand one after the other in `ids`."""
    content = np.ascontiguousarray(ids, "<i4").tobytes()
    hashes, at = [], 0
    for length in lengths:
        end = at + 4 * length
        hashes.append(int.from_bytes(hashlib.blake2b(content[at:end], digest_size=8).digest(), "little"))
        at = end
    return hashes


def hash_rows(file: Path) -> np.ndarray:
    """[rows] uint64, `content_hashes` of a whole file."""
    with RowFile(file) as rows:
        hashes = np.empty(len(rows), np.uint64)
        for begin, end in rows.blocks():
            hashes[begin:end] = content_hashes(rows.rows(begin, end), rows.lengths[begin:end].tolist())
    return hashes


def count_duplicates(hashes: np.ndarray) -> int:
    """Rows whose content an earlier row has too; leaves `hashes` sorted, which saves a copy."""
    hashes.sort()
    return int(np.count_nonzero(hashes[1:] == hashes[:-1]))


def divide(hashes: np.ndarray, shares: list[float]) -> np.ndarray:
    """[rows] uint8, the part each row belongs to: a function of its content alone, so that equal rows stay together.

    Args:
        hashes: [rows] uint64.
        shares: of each part; they need not sum to one.
    """
    bounds = np.cumsum(shares) / sum(shares)
    last = max(part for part, share in enumerate(shares) if share)  # rounding must not open a part without share
    parts = np.searchsorted(bounds, hashes / HASHES, side="right")
    return np.minimum(parts, last).astype(np.uint8)


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
