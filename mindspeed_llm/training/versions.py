"""`--add-version`: a folder of its own for every run below --save, `vN-<YYYYmmdd-HHMMSS>`."""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mindspeed_llm.arguments.programs import PosttrainOptions
from mindspeed_llm.training.retention import iterations

VERSION = re.compile(r"^v(\d+)-\d{8}-\d{6}$")


def versions(folder: Path) -> list[Path]:
    """The run folders below `folder`, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("v*") if (match := VERSION.match(path.name))]
    return [path for _, path in sorted(found)]


def run_folder(folder: Path, resumes: bool, now: float) -> Path:
    """Where a run below `folder` saves: a new version, or the newest that has a checkpoint when it resumes.

    Args:
        resumes: --auto-resume is given.
        now: seconds since the epoch; they give a new version its time, in local time.
    """
    there = versions(folder)
    started = [path for path in there if iterations(path)]
    if resumes and started:
        return started[-1]
    number = int(VERSION.match(there[-1].name)[1]) + 1 if there else 0
    return folder / f"v{number}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}"


def with_version(options: PosttrainOptions) -> PosttrainOptions:
    """The options with --save naming the run's own folder, alike on all ranks; collective. Made by rank 0."""
    checkpoint = options.checkpoint
    if not checkpoint.add_version or not checkpoint.save:
        return options
    chosen: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        folder = run_folder(Path(checkpoint.save), checkpoint.auto_resume, time.time())
        chosen = [str(folder)]
    torch.distributed.broadcast_object_list(chosen, src=0)
    return replace(options, checkpoint=replace(checkpoint, save=chosen[0]))
