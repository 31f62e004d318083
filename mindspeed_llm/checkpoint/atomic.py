"""Writing so that a kill at any moment leaves nothing visible, or a finished result.

Files are written into a hidden folder beside the final one, made durable, and appear by one rename.
"""

import os
import shutil
from pathlib import Path

from mindspeed_llm.errors import InputError

FILE_MODE = 0o640
TRACKER = "latest_checkpointed_iteration.txt"


def sync_path(path: Path) -> None:
    """Make a file's contents or a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: aside, fsync, rename."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.chmod(FILE_MODE)
    aside.rename(path)
    sync_path(path.parent)


class StagedDirectory:
    """A folder that appears finished or not at all.

    One process or many: the owner (rank 0) calls `create`, everybody writes and syncs files under `path`, the owner
    calls `publish`; the caller puts a barrier between the three. A leftover of a killed run is removed by `create`.
    """

    def __init__(self, final: str | Path) -> None:
        """`final` is where the folder will appear; its parent is made by `create`."""
        self.final = Path(final).absolute()
        self.path = self.final.parent / f".{self.final.name}.partial"

    def create(self) -> Path:
        """Make the empty folder to write into, and its parents."""
        try:
            if self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be made ({error.strerror}); choose a writable folder") from error
        return self.path

    def publish(self) -> None:
        """Give the folder its final name; an existing folder of that name is replaced.

        Between the two renames of a replacement the old folder lies at `.<name>.old`, so it is never lost.
        """
        for folder, _, names in os.walk(self.path):
            for name in names:
                Path(folder, name).chmod(FILE_MODE)
            sync_path(Path(folder))
        old = self.final.parent / f".{self.final.name}.old"
        if self.final.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.final.rename(old)
        self.path.rename(self.final)
        sync_path(self.final.parent)
        shutil.rmtree(old, ignore_errors=True)

    def publish_into(self, last: str) -> None:
        """Move the files into the existing folder `final`, which keeps its other files; the file `last` comes last.

        A reader that needs `last` (an HF folder's config.json) so finds all files or no model.
        """
        names = sorted(path.name for path in self.path.iterdir())
        for name in [name for name in names if name != last] + [name for name in names if name == last]:
            (self.path / name).chmod(FILE_MODE)
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
