"""Arrays that one process computes and all read: orders of rows that are large and the same on every rank.

A file's name says what it was computed from, so that it can be neither stale nor mistaken for another. One process
builds it and renames it into place; the others wait for it to appear, and map it. No collective is needed, so that a
thread that prepares batches may ask as well.
"""

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_llm.errors import InputError

POLL_SECONDS = 0.05


class IndexCache:
    """A folder of computed arrays."""

    def __init__(self, folder: str | Path, builds: bool, patience: float = 600.0) -> None:
        """Args:
        folder: where the files lie; made when it is missing.
        builds: this process computes what is missing: rank 0 where the nodes share the folder, the first process of
            every node where they do not.
        patience: how long the others wait for a file, in seconds.
        """
        self.folder = Path(folder).expanduser()
        self.builds = builds
        self.patience = patience

    def array(self, origin: Mapping[str, Any], build: Callable[[], np.ndarray]) -> np.ndarray:
        """The array computed from `origin`, mapped read-only.

        Args:
            origin: everything the array follows from, as JSON values; equal on all ranks.
            build: computes it.

        Raises:
            InputError: the process that builds has not made the file within the patience, most likely because the
                folder is not shared between the nodes.
        """
        key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:32]
        file = self.folder / f"{key}.npy"
        if self.builds and not file.exists():
            self._build(file, build)
        wait_for(file, self.patience)
        return np.load(file, mmap_mode="r")

    def _build(self, file: Path, build: Callable[[], np.ndarray]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
            with aside.open("wb") as stream:
                np.save(stream, build())
                stream.flush()
                os.fsync(stream.fileno())
            aside.replace(file)
        except OSError as error:
            raise InputError(
                f"cannot write {file} ({error.strerror}); name a folder for it that can be written to"
            ) from error


def wait_for(file: Path, patience: float) -> None:
    """Wait until a file that another process makes is there.

    Raises:
        InputError: it is not there after `patience` seconds.
    """
    end = time.monotonic() + patience
    while not file.exists():
        if time.monotonic() >= end:
            raise InputError(
                f"{socket.gethostname()} does not see {file} after {patience:.0f} s, which another process was to "
                "make; where the nodes share no file system say so with --no-shared-storage, else look at its log"
            )
        time.sleep(POLL_SECONDS)


def lengths_origin(lengths: np.ndarray) -> str:
    """sha256 of the rows' lengths, to tell one data set from another."""
    return hashlib.sha256(np.ascontiguousarray(lengths, "<i8").tobytes()).hexdigest()
