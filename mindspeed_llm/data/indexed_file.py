"""Megatron's indexed files: token sequences in `<prefix>.bin`, where each begins in `<prefix>.idx`.

The index, little-endian: magic `MMIDIDX\\0\\0` (9 bytes), u64 version (1), u8 code of the element type, u64 number of
sequences, u64 number of document boundaries, int32 lengths, int64 byte offsets, int64 document boundaries (the first
sequence of each document, and the end).
"""

import os
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from mindspeed_llm.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
INDEX_BLOCK = 1 << 16  # sequences whose index entries are made at once
BLOCK_TOKENS = 1 << 20  # tokens that `RowFile.blocks` puts together
BLOCK_ROWS = 1 << 13  # and rows, of which Python makes objects
# code -> element type, as Megatron numbers them
ELEMENT_TYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in ELEMENT_TYPES.items()}


class IndexedFileWriter:
    """Writes one pair of files, sequence after sequence; every sequence is a document.

    A length of -1 ends a document without a sequence, as upstream's files have it for rows it left out. The tokens go
    to disk at once; 4 bytes per sequence stay in memory. The files are complete after `close`, which
    leaving the `with` block without an error calls; publishing them under their final name is the caller's part.
    """

    def __init__(
        self, prefix: Path, dtype: np.dtype | type = np.int32, like: "IndexedFileWriter | None" = None
    ) -> None:
        """Args:
        prefix: path without .bin / .idx.
        dtype: element type, one of `ELEMENT_TYPES`.
        like: a writer whose sequences have the lengths of these, added there first and closed there last; they are
            kept once.
        """
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.code = CODES[self.dtype]
        self.prefix = prefix
        self.like = like
        self.lengths = array("i") if like is None else like.lengths
        self.stream = open(f"{prefix}.bin", "wb")  # noqa: SIM115 - closed by close() or __exit__

    def add(self, tokens: np.ndarray, lengths: list[int]) -> None:
        """Append sequences that stand one after the other in `tokens` [sum(lengths)]."""
        assert tokens.size == sum(max(length, 0) for length in lengths)
        self.stream.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        if self.like is None:
            self.lengths.extend(lengths)

    def close(self) -> None:
        """Finish both files and force them to disk."""
        _sync_and_close(self.stream)
        documents = len(self.lengths)
        sequences = documents - sum(int(np.count_nonzero(block < 0)) for block in self._blocks())
        with open(f"{self.prefix}.idx", "wb") as stream:
            stream.write(HEADER.pack(MAGIC, VERSION, self.code, sequences, documents + 1))
            for block in self._blocks():
                stream.write(block[block >= 0].tobytes())
            offset = 0
            for block in self._blocks():
                ends = offset + np.cumsum(block[block >= 0], dtype="<i8") * self.dtype.itemsize
                stream.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes() if ends.size else b"")
                offset = int(ends[-1]) if ends.size else offset
            stream.write(np.zeros(1, "<i8").tobytes())
            sequence = 0
            for block in self._blocks():
                boundaries = sequence + np.cumsum(block >= 0, dtype="<i8")
                stream.write(boundaries.tobytes())
                sequence = int(boundaries[-1])
            _sync_and_close(stream)

    def _blocks(self) -> Iterator[np.ndarray]:
        """The lengths, a part at a time, so that an index is written in little memory."""
        for begin in range(0, len(self.lengths), INDEX_BLOCK):
            yield np.array(self.lengths[begin : begin + INDEX_BLOCK], dtype="<i4")

    def __enter__(self) -> "IndexedFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.stream.close()


def _sync_and_close(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


class IndexedFile:
    """Reads one pair of files through the page cache: nothing is loaded before a sequence is asked for.

    Attributes:
        lengths: [sequences] int32, tokens of each.
        documents: [documents + 1] int64, first sequence of each document, and the end.
        dtype: element type.
    """

    def __init__(self, prefix: Path) -> None:
        """Open `<prefix>.bin` and `<prefix>.idx`.

        Raises:
            InputError: a file is missing, is no such file, or is shorter than it says.
        """
        self.prefix = prefix
        index = Path(f"{prefix}.idx")
        data = Path(f"{prefix}.bin")
        for file in (index, data):
            if not file.is_file():
                raise InputError(f"{file} is missing; both {data.name} and {index.name} belong together")
        self.dtype, self.lengths, self.offsets, self.documents = _read_index(index)
        expected, size = _expected_bytes(index, len(self.lengths), self.dtype.itemsize), data.stat().st_size
        if expected > size:
            raise InputError(f"{data} holds {size} bytes, its index expects {expected}: it is truncated")
        # numpy cannot map an empty file
        self.tokens = np.memmap(data, dtype=np.uint8, mode="r") if size else np.zeros(0, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> np.ndarray:
        """Sequence `number` as a read-only view [length] of the mapped file; negative numbers are refused."""
        if not 0 <= number < len(self.lengths):
            raise IndexError(f"sequence {number} of {len(self.lengths)} in {self.prefix}")
        return np.frombuffer(self.tokens, self.dtype, int(self.lengths[number]), int(self.offsets[number]))


def _expected_bytes(index: Path, sequences: int, width: int) -> int:
    """Bytes of data that an index speaks of, read a part at a time: what is mapped and looked at counts as memory."""
    total = end = 0
    for begin in range(0, sequences, INDEX_BLOCK):
        count = min(INDEX_BLOCK, sequences - begin)
        lengths = np.fromfile(index, "<i4", count, offset=HEADER.size + 4 * begin).astype(np.int64) * width
        offsets = np.fromfile(index, "<i8", count, offset=HEADER.size + 4 * sequences + 8 * begin)
        total += int(lengths.sum())
        end = max(end, int((offsets + lengths).max()))
    return max(total, end)


def _read_index(index: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Element type, lengths, byte offsets and document boundaries of an .idx file, checked against its size."""
    size = index.stat().st_size
    with index.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise InputError(f"{index} is not an indexed data file (it starts {header[:9]!r}, not {MAGIC!r})")
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != VERSION or code not in ELEMENT_TYPES:
        raise InputError(f"{index} has version {version}, element code {code}; read are version 1, codes 1 to 8")
    expected = HEADER.size + sequences * 12 + documents * 8
    if size < expected:
        raise InputError(f"{index} holds {size} bytes, {sequences} sequences need {expected}: it is truncated")
    content = np.memmap(index, dtype=np.uint8, mode="r")
    at = HEADER.size
    lengths = np.frombuffer(content, "<i4", sequences, at)
    offsets = np.frombuffer(content, "<i8", sequences, at + sequences * 4)
    boundaries = np.frombuffer(content, "<i8", documents, at + sequences * 12)
    return ELEMENT_TYPES[code], lengths, offsets, boundaries


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
        """(begin, end) of runs of rows of about `BLOCK_TOKENS` together, and `BLOCK_ROWS` at most."""
        begin = tokens = 0
        for row, length in enumerate(self.lengths):
            if (tokens and tokens + length > BLOCK_TOKENS) or row - begin == BLOCK_ROWS:
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
