"""Files that appear all at once: written aside, then renamed, and put right by the next run where one was killed.

A run's files lie in `.<name>.<random>.partial` beside their targets, locked while the run lives. Once all are complete
the folder says so (`ready.json`) and they are renamed one after the other: the old index files and report go first, the
new report comes last, so that an incomplete set is never taken for a whole one. A run that finds the folder of a dead
run finishes its renaming where it was ready, and else removes it.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

READY = "ready.json"
LOCK = "lock"


class Aside:
    """The folder in which a run writes, removed when the `with` block is left before `publish` has begun."""

    def __init__(self, prefix: Path) -> None:
        """Args: prefix: path and first part of the name of the files to come; its folder exists."""
        self.parent = prefix.parent
        self.path = Path(tempfile.mkdtemp(prefix=f".{prefix.name}.", suffix=".partial", dir=self.parent))
        self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.ready = False

    def publish(self, names: Sequence[str]) -> None:
        """Rename the finished files of these names into place, in this order."""
        _write_synced(self.path / READY, json.dumps(list(names)))
        _sync_folder(self.path)
        self.ready = True
        _rename_all(self.path, names)

    def __enter__(self) -> "Aside":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave nothing behind; a set whose renaming was interrupted stays for the next run."""
        if kind is None or not self.ready:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def settle(prefix: Path) -> list[str]:
    """Finish or remove what killed runs of a prefix have left; returns the names of files that were put in place."""
    finished: list[str] = []
    if not prefix.parent.is_dir():
        return finished
    for folder in sorted(prefix.parent.glob(f".{_escaped(prefix.name)}.*.partial")):
        lock = _lock_of_dead(folder)
        if lock is None:
            continue
        try:
            names = json.loads((folder / READY).read_text())
        except (OSError, ValueError):
            names = []
        _rename_all(folder, names)
        finished += names
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
    return finished


def _escaped(name: str) -> str:
    """`name` as a glob pattern that matches nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _lock_of_dead(folder: Path) -> int | None:
    """The lock of a folder whose run has ended, taken over; None while the run lives."""
    try:
        lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _rename_all(folder: Path, names: Sequence[str]) -> None:
    """Rename what of the set is still in `folder` into its parent."""
    left = [name for name in names if (folder / name).exists()]
    for name in left:
        if not name.endswith(".bin"):
            (folder.parent / name).unlink(missing_ok=True)
    for name in left:
        (folder / name).replace(folder.parent / name)
    if left:
        _sync_folder(folder.parent)


def _write_synced(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
