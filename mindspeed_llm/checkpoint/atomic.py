"""Writing so that a kill at any moment leaves nothing visible, or a finished result.

Files are written into a hidden folder beside the final one, made durable, and appear by one rename. Where a folder of
that name exists, the two change places in one step (Linux's renameat2), so that a reader finds the old or the new one.
"""

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mindspeed_llm.errors import InputError

FILE_MODE = 0o640
TRACKER = "latest_checkpointed_iteration.txt"
AT_FDCWD = -100
RENAME_EXCHANGE = 2


def sync_path(path: Path) -> None:
    """Make a file's contents or a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def aside_of(path: Path) -> Path:
    """Where a small file is written before it gets its name."""
    return path.with_name(f".{path.name}.partial")


def write_aside(path: Path, text: str) -> Path:
    """Write a small file durably beside `path`; one rename gives it its name. -> where it lies."""
    aside = aside_of(path)
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.chmod(FILE_MODE)
    return aside


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: aside, fsync, rename."""
    write_aside(path, text).rename(path)
    sync_path(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths of one file system change places in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def link_tree(origin: Path, target: Path) -> None:
    """A second name for a file, or for each file of a folder; a copy where the file system has no second names."""
    if origin.is_symlink():
        target.symlink_to(origin.readlink())
    elif origin.is_dir():
        target.mkdir()
        for path in origin.iterdir():
            link_tree(path, target / path.name)
        shutil.copystat(origin, target)
    else:
        try:
            os.link(origin, target)
        except OSError:
            shutil.copy2(origin, target)


class StagedDirectory:
    """A folder that appears finished or not at all.

    One process or many: the owner (rank 0) calls `create`, everybody writes and syncs files under `path`, the owner
    calls `publish`; the caller puts a barrier between the three. A leftover of a killed run is removed by `create`.
    """

    def __init__(self, final: str | Path, stays: bool = False) -> None:
        """`final` is where the folder will appear; its parent is made by `create`.

        Where `final` is a link to a folder, that folder is meant. A folder whose parent cannot be written, or that is a
        file system of its own, cannot be renamed, and one that `stays` (a shell stands in it) must not be: the work is
        then done inside it.
        """
        self.final = Path(final).absolute()
        if self.final.is_symlink():
            self.final = Path(os.path.realpath(self.final))
        self.inside = self.final.is_dir() and (
            stays or os.path.ismount(self.final) or not os.access(self.final.parent, os.W_OK | os.X_OK)
        )
        self.path = (self.final if self.inside else self.final.parent) / f".{self.final.name}.partial"
        self.old = self.path.with_name(f".{self.final.name}.old")

    def create(self) -> Path:
        """Make the empty folder to write into, and its parents; what a killed run left is put right or removed."""
        try:
            if self.old.exists() and not self.final.exists():
                self.old.rename(self.final)
            for leftover in (self.path, self.old):
                if leftover.exists():
                    shutil.rmtree(leftover)
            self.path.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be made ({error.strerror}); choose a writable folder") from error
        return self.path

    def publish(self, keep: Callable[[str], bool] | None = None, last: str | None = None) -> None:
        """Give the folder its final name; an existing folder of that name is replaced in one step.

        Args:
            keep: says of a name in the existing folder whether it is carried over into the new one, which does not
                have it. Left out, nothing is.
            last: work inside an existing folder is moved into it file by file, and this one (an HF folder's
                config.json, without which there is no model) comes last.
        """
        for folder, _, names in os.walk(self.path):
            for name in names:
                Path(folder, name).chmod(FILE_MODE)
            sync_path(Path(folder))
        if self.inside:
            self.move_in(last)
            return
        if self.final.exists():
            for path in self.final.iterdir() if keep else ():
                if keep(path.name) and not (self.path / path.name).exists():
                    link_tree(path, self.path / path.name)
            self.replace()
        else:
            self.path.rename(self.final)
        sync_path(self.final.parent)
        for folder in (self.path, self.old):
            shutil.rmtree(folder, ignore_errors=True)

    def replace(self) -> None:
        """Take the place of the existing folder.

        Where two folders cannot change places in one step, the old one lies at `.<name>.old` for a moment; `create`
        of the next run brings it back if that moment was the last.
        """
        if not exchange(self.path, self.final):
            self.final.rename(self.old)
            self.path.rename(self.final)

    def move_in(self, last: str | None) -> None:
        """Move the files into the folder around; `last` comes last."""
        for name in sorted((path.name for path in self.path.iterdir()), key=lambda name: (name == last, name)):
            (self.path / name).replace(self.final / name)
        sync_path(self.final)
        self.path.rmdir()

    def discard(self) -> None:
        """Remove what was written; nothing becomes visible."""
        shutil.rmtree(self.path, ignore_errors=True)


def iteration_folder(iteration: int) -> str:
    """The folder name of an iteration."""
    return f"iter_{iteration:07d}"


def write_tracker(folder: str | Path, iteration: int | str) -> None:
    """Point the tracker at a finished checkpoint: an iteration number or "release"."""
    write_text(Path(folder) / TRACKER, str(iteration))
