"""How the result of a conversion appears: by one writer at a time, in one step, whatever ends the program.

exclusive(folder)          nobody else writes there
staged(...)                aside -> durable -> one rename; what a killed run left is removed before
signals_held()             a signal waits while the result gets its name
ended_by_signals()         SIGTERM and SIGHUP unwind like an interrupt, so that what lies aside is removed
"""

import contextlib
import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from mindspeed_llm.checkpoint.atomic import TRACKER, StagedDirectory, aside_of, sync_path, write_aside
from mindspeed_llm.checkpoint.formats.run_folder import iterations
from mindspeed_llm.errors import InputError, UsageError

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
"""What an earlier result leaves in an HF folder; `--overwrite` replaces all of these."""
CONFIG = "config.json"


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise `SystemExit` with a shell's status (143, 129), as SIGINT interrupts."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Signals that end the program wait until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = {number: signal.signal(number, lambda got, _: waiting.append(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        for number in waiting[:1]:
            os.kill(os.getpid(), number)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Be the only converter that writes `folder`; its parents are made, and removed again if they stay empty.

    Raises:
        InputError: another one is writing it, or its place is not writable.
    """
    made = []
    try:
        for parent in reversed(folder.parents):
            if not parent.exists():
                with contextlib.suppress(FileExistsError):
                    parent.mkdir()
                    made.append(parent)
        writable = os.access(folder.parent, os.W_OK | os.X_OK)
        lock = (folder.parent if writable else folder) / f".{folder.name}.lock"
        descriptor = locked(lock, folder)
    except OSError as error:
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose a writable --save-dir") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)
        for parent in reversed(made):
            with contextlib.suppress(OSError):  # the result lies in it
                parent.rmdir()


def locked(lock: Path, folder: Path) -> int:
    """The descriptor of the lock file, held; `InputError` when another process holds it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise InputError(f"{folder}: another conversion is writing it; wait, or choose another folder") from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        os.close(descriptor)  # the former holder removed the file between opening and locking it


def result_exists(final: Path, megatron: bool) -> bool:
    """Whether a finished result lies at `final`, an iteration folder or an HF folder.

    What a run left that was killed while its files got their names is none: the next run replaces it unasked.
    """
    if not megatron:
        moving = final / f".{final.name}.partial"
        return not moving.exists() and any(final.glob(WEIGHTS[0]))
    tracker = final.parent / TRACKER
    others = [path for path in iterations(final.parent) if path != final]
    return tracker.exists() or bool(others) or (final.exists() and not aside_of(tracker).exists())


def refuse_taken(final: Path, megatron: bool, overwrite: bool) -> None:
    """`UsageError` when a result lies there that may not be replaced."""
    if not overwrite and result_exists(final, megatron):
        raise UsageError(f"{final}: a result is there already; give --overwrite to replace it, or another --save-dir")


def staged(final: Path, megatron: bool, overwrite: bool, write: Callable[[Path], None], iteration: int = 1) -> None:
    """Write a result so that at any moment nothing of it is visible, or all.

    Args:
        final: an iteration folder, to which its parent's tracker will point, or an HF folder, whose other files stay.
        write: writes the files into the folder it is given.

    Raises:
        InputError: it cannot be written; nothing is left behind.
        UsageError: a result has appeared there meanwhile.
    """
    final = Path(os.path.realpath(final))  # by whatever name, one folder has one lock
    run = final.parent
    whole = megatron and not run.exists()
    with exclusive(run if whole else final):
        refuse_taken(final, megatron, overwrite)
        if megatron and not whole:
            clear_leftover(run)
        stage = StagedDirectory(run if whole else final, stays=stands_in(final))
        refuse_half_replacement(stage, megatron)
        try:
            folder = stage.create()
            if whole:
                folder = folder / final.name
                folder.mkdir()
            write(folder)
            with signals_held():
                if megatron:
                    publish_checkpoint(stage, whole, iteration)
                else:
                    stage.publish(lambda name: not any(Path(name).match(pattern) for pattern in WEIGHTS), CONFIG)
        except OSError as error:
            discard(stage, run if megatron and not whole else None)
            raise InputError(f"{final}: cannot be written ({error.strerror}); nothing was left behind") from error
        except BaseException:
            discard(stage, run if megatron and not whole else None)
            raise


def publish_checkpoint(stage: StagedDirectory, whole: bool, iteration: int) -> None:
    """Let an iteration folder appear, and its tracker: with the run folder around them, or after it.

    In the second case the tracker lies ready aside before the folder appears, which tells the next run that a folder
    without a tracker is that of a run killed in between.
    """
    if whole:
        write_aside(stage.path / TRACKER, str(iteration)).rename(stage.path / TRACKER)
        stage.publish()
        return
    tracker = stage.final.parent / TRACKER
    aside = write_aside(tracker, str(iteration))
    stage.publish()
    aside.rename(tracker)
    sync_path(tracker.parent)


def discard(stage: StagedDirectory, run: Path | None) -> None:
    """Remove what was written; `run` is the run folder whose tracker may lie ready."""
    stage.discard()
    if run is not None:
        aside_of(run / TRACKER).unlink(missing_ok=True)


def clear_leftover(run: Path) -> None:
    """Remove what a killed run left beside a run folder that did not exist yet."""
    leftover, lock = StagedDirectory(run).path, run.parent / f".{run.name}.lock"
    if leftover.parent == run.parent and leftover.exists():
        with contextlib.suppress(InputError), exclusive(run):
            shutil.rmtree(leftover, ignore_errors=True)
    elif lock.exists():
        with contextlib.suppress(InputError), exclusive(run):
            pass


def refuse_half_replacement(stage: StagedDirectory, megatron: bool) -> None:
    """`InputError` when a model would have to be replaced file by file, where a reader could find half of each."""
    if stage.inside and (megatron or (stage.final / CONFIG).exists()):
        raise InputError(
            f"{stage.final}: holds a model that cannot be replaced in one step (it is the current folder or a mount"
            " point, or its parent folder is not writable); choose another --save-dir"
        )


def stands_in(folder: Path) -> bool:
    """Whether the current folder is this one or lies in it."""
    with contextlib.suppress(FileNotFoundError):
        return Path.cwd().is_relative_to(folder)
    return False
