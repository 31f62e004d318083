"""Which rows are equal, and which part of a split a row belongs to: both follow from a row's tokens alone.

Per row there are 8 bytes of hash and 1 of its part.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mindspeed_llm.data.indexed_file import RowFile
from mindspeed_llm.errors import InputError, UsageError

PARTS = ("train", "valid", "test")
HASHES = float(1 << 64)


def content_hashes(ids: np.ndarray, lengths: Iterable[int]) -> list[int]:
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


def split_shares(split: str) -> list[float]:
    """The three shares of `--split`, missing ones 0. Raises UsageError when they cannot be read."""
    try:
        shares = [float(word) for word in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise UsageError(f"--split {split!r}: expected up to three shares such as 95,5,0")
    return shares + [0.0] * (3 - len(shares))


def divide(hashes: np.ndarray, split: str) -> np.ndarray:
    """[rows] uint8, the part each row belongs to: a function of its content, so that equal rows stay together.

    The hashes' range is divided by the shares. A part that no hash falls into, as happens with few rows, takes the rows
    of the hash next to its own range out of a part that keeps others.

    Args:
        hashes: [rows] uint64.
        split: shares such as "95,5,0".

    Raises:
        UsageError: the shares cannot be read.
        InputError: there are fewer different rows than parts.
    """
    shares = split_shares(split)
    bounds = np.cumsum(shares) / sum(shares)
    last = max(part for part, share in enumerate(shares) if share)  # rounding opens no part without a share
    parts = np.zeros(len(hashes), np.uint8)
    for bound in bounds[:last]:
        parts += hashes >= np.uint64(min(int(bound * HASHES), (1 << 64) - 1))
    for part, share in enumerate(shares):
        if share and not (parts == part).any():
            low = bounds[part] - share / sum(shares)
            parts[hashes == _nearest(hashes, parts, (low + bounds[part]) / 2, split)] = part
    return parts


def _nearest(hashes: np.ndarray, parts: np.ndarray, place: float, split: str) -> np.uint64:
    """The hash next to `place` (0..1) among those whose part holds other rows too."""
    best: np.uint64 | None = None
    for part in np.unique(parts):
        own = np.unique(hashes[parts == part])
        if len(own) > 1:
            found = own[np.argmin(np.abs(own / HASHES - place))]
            if best is None or abs(found / HASHES - place) < abs(best / HASHES - place):
                best = found
    if best is None:
        raise InputError(
            f"--split {split}: {len(np.unique(hashes))} different rows cannot be divided into "
            f"{sum(share > 0 for share in split_shares(split))} parts; give more rows, or --split 100,0,0"
        )
    return best
