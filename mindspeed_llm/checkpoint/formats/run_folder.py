"""Which iteration folder a Megatron run's folder stands for, and the rank files in it."""

import os
import re
from pathlib import Path
from typing import Any

from mindspeed_llm.checkpoint.atomic import TRACKER, iteration_folder
from mindspeed_llm.checkpoint.formats.torch_file import read_torch_file
from mindspeed_llm.checkpoint.layout import CHECKPOINT_FILE, RANK_FOLDER, Rank
from mindspeed_llm.errors import InputError

ITERATION_NUMBER = re.compile(r"^[0-9]{1,18}$")
MODEL_KEY = re.compile(r"^model\d*$")


def is_megatron(folder: str | Path) -> bool:
    """Whether a folder looks like a Megatron checkpoint: a tracker, rank folders, or torch_dist's files."""
    folder = Path(folder)
    return os.path.lexists(folder / TRACKER) or holds_checkpoint(folder) or bool(iterations(folder))


def holds_checkpoint(folder: Path) -> bool:
    """Whether a folder itself is an iteration folder."""
    return any(folder.glob("mp_rank_*")) or (folder / "metadata.json").is_file()


def iterations(folder: Path) -> list[Path]:
    """The iteration folders of a run folder, the newest last."""
    found = [path for path in folder.glob("iter_*") if ITERATION_NUMBER.match(path.name[5:]) and holds_checkpoint(path)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def resolve(folder: str | Path) -> Path:
    """The iteration folder of a run folder, or the folder itself when it is one.

    A run folder's tracker names it; without a tracker it is the newest. A link, such as a run's `best`, is followed.

    Raises:
        InputError: neither, or the tracker points to nothing.
    """
    folder = Path(folder)
    tracker = folder / TRACKER
    if os.path.lexists(tracker):
        try:
            text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise InputError(f"{tracker}: cannot be read ({error.strerror}); write it anew") from error
        if text != "release" and not ITERATION_NUMBER.match(text):
            raise InputError(f"{tracker}: says {text!r:.40}, expected an iteration number or release")
        found = folder / ("release" if text == "release" else iteration_folder(int(text)))
        if not found.is_dir():
            raise InputError(f"{tracker}: says {text}, but {found} does not exist; correct the tracker")
        return found
    if holds_checkpoint(folder):
        return Path(os.path.realpath(folder)) if folder.is_symlink() else folder
    if found := iterations(folder):
        return found[-1]
    there = "" if folder.is_dir() else " (no such folder)"
    raise InputError(f"{folder}{there}: no Megatron checkpoint: neither {TRACKER} nor mp_rank_* folders")


def read_ranks(folder: Path) -> dict[Rank, dict[str, Any]]:
    """The files of an iteration folder by rank; `InputError` when one is missing."""
    found: dict[Rank, Path] = {}
    matches: list[tuple[re.Match[str], Path]] = []
    for path in sorted(folder.glob("mp_rank_*")):
        match = RANK_FOLDER.match(path.name)
        if not match:
            raise InputError(f"{path}: not a rank folder's name (mp_rank_TT, mp_rank_TT_PPP or mp_rank_TT_PPP_EEE)")
        matches.append((match, path))
    if not matches:
        raise InputError(f"{folder}: no mp_rank_* folders in it")
    shapes = {tuple(group is not None for group in match.groups()) for match, _ in matches}
    if len(shapes) > 1:
        raise InputError(f"{folder}: rank folders of different layouts lie in it; remove those of an earlier run")
    for match, path in matches:
        found[Rank(int(match[1]), int(match[2] or 0), int(match[3] or 0))] = path / CHECKPOINT_FILE
    files: dict[Rank, dict[str, Any]] = {}
    for rank, path in found.items():
        files[rank] = read_torch_file(path)
        if not isinstance(files[rank], dict) or not any(MODEL_KEY.match(str(key)) for key in files[rank]):
            raise InputError(f"{path}: not a checkpoint: it has no model")
    if shapes == {(True, True, False)}:
        files = as_expert_ranks(files)
    sizes = [max(rank[axis] for rank in files) + 1 for axis in (0, 1)]
    lost = [
        f"{tp:02d}_{pp:03d}"
        for pp in range(sizes[1])
        for tp in range(sizes[0])
        if not any(rank[:2] == (tp, pp) for rank in files)
    ]
    if lost:
        raise InputError(f"{folder}: rank folders are missing for TP{sizes[0]} PP{sizes[1]}: mp_rank_{', '.join(lost)}")
    return files


def as_expert_ranks(files: dict[Rank, dict[str, Any]]) -> dict[Rank, dict[str, Any]]:
    """Files whose one extra number is the expert's, not the stage's: their args say so."""
    args = next(iter(files.values())).get("args")
    if (
        getattr(args, "pipeline_model_parallel_size", 1) == 1
        and (getattr(args, "expert_model_parallel_size", 1) or 1) > 1
    ):
        return {Rank(rank.tp, 0, rank.pp): file for rank, file in files.items()}
    return files
