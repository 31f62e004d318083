"""Sizes for people: bytes in words, a progress bar, and whether a result has room."""

import re
import shutil
from pathlib import Path

from tqdm import tqdm

from mindspeed_llm.errors import InputError, UsageError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse_size(text: str, flag: str) -> int:
    """Bytes of "5GB", "500MiB" or "1000"; `UsageError` naming the flag otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", text.strip(), re.IGNORECASE)
    unit = (match[2] or "").capitalize() if match else ""
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"{flag} {text}: not a size; write it as 500MB or 5GB")
    return int(float(match[1]) * UNITS[unit])


def free_space(folder: Path) -> int:
    """Bytes the file system of a folder that may not exist yet has left."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def check_space(folder: Path, nbytes: int) -> None:
    """`InputError` when the file system has less room than a result needs beside what lies there.

    A result that is replaced stays until the new one is complete, so its room does not count as free.
    """
    free = free_space(folder)
    if free < nbytes:
        raise InputError(
            f"{folder}: needs {human(nbytes)}, its file system has {human(free)} free; choose another --save-dir"
        )


def progress_bar(total: int) -> tqdm:
    """Bytes written, rate and time left, on standard error."""
    return tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, desc="converting", mininterval=0.5)


def human(nbytes: int) -> str:
    """A byte count for people: "1.19 GB"."""
    value, units = float(nbytes), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
