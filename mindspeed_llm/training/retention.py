"""Which checkpoints of a run stay, which is the best, and what a killed run left behind.

<save>/iter_0000020, iter_0000040    finished checkpoints
<save>/best -> iter_0000020          the one with the lowest validation loss, where there are validation rows
<save>/.iter_0000060.partial         of a save that was killed; removed at the next start
<save>/.iter_0000010.deleted         of a removal that was killed; removed at the next start
"""

import contextlib
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

from mindspeed_llm.checkpoint.atomic import iteration_folder
from mindspeed_llm.training.checkpointing import Progress

ITERATION = re.compile(r"^iter_(\d{7,})$")
LEFTOVER = re.compile(r"^\.iter_\d{7,}\.(partial|old|deleted)$")
REMOVABLE = re.compile(r"^\.iter_\d{7,}\.(partial|deleted)$")
BEST = "best"
"""Name of the link to the best checkpoint."""


def iterations(folder: Path) -> list[Path]:
    """Finished checkpoints below a run folder, oldest first. A folder that bears its final name is finished."""
    found = [(int(match[1]), path) for path in folder.glob("iter_*") if (match := ITERATION.match(path.name))]
    return [path for _, path in sorted(found)]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a kill in between leaves no half of it under its name."""
    aside = checkpoint.with_name(f".{checkpoint.name}.deleted")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what killed saves and removals left in a run folder; -> their names."""
    names = [path.name for path in folder.glob(".iter_*") if REMOVABLE.match(path.name)] if folder.is_dir() else []
    for name in names:
        shutil.rmtree(folder / name)
    return sorted(names)


def surplus(saved: list[Path], limit: int | None, best: Path | None) -> list[Path]:
    """The checkpoints beyond `limit`: the oldest ones, but neither the last nor the best.

    Args:
        saved: finished checkpoints, oldest first.
        best: the best one; None without validation.
    """
    if limit is None:
        return []
    free = [path for path in saved[:-1] if path != best]
    return free[: max(0, len(saved) - limit)]


def link_best(folder: Path, checkpoint: Path) -> None:
    """Let `<folder>/best` stand for a checkpoint; the link changes in one step."""
    link, aside = folder / BEST, folder / f".{BEST}.partial"
    if link.is_symlink() and link.readlink() == Path(checkpoint.name):
        return
    with contextlib.suppress(FileNotFoundError):
        aside.unlink()
    aside.symlink_to(checkpoint.name)
    aside.replace(link)


def best_checkpoint(folder: Path, progress: Progress) -> Path | None:
    """The best checkpoint of the run, if it exists."""
    path = folder / iteration_folder(progress.saved_best)
    return path if progress.saved_best and path.is_dir() else None


def validated(progress: Progress, loss: float, threshold: float) -> Progress:
    """Count a validation; a loss that is not a number is no gain."""
    if loss < progress.best_loss - (threshold if math.isfinite(progress.best_loss) else 0.0):
        return replace(progress, best_loss=loss, without_gain=0)
    return replace(progress, without_gain=progress.without_gain + 1)


def about_to_save(progress: Progress, loss: float | None) -> Progress:
    """The progress a checkpoint of this step records: whether it is the best one so far.

    Args:
        loss: the validation loss at this very step; None without one.
    """
    if loss is None or not loss < progress.saved_best_loss:
        return progress
    return replace(progress, saved_best=progress.iteration, saved_best_loss=loss)
