"""The processes that tokenise: chunks of rows out, their tokens back in the same order."""

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from mindspeed_llm.errors import InputError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

Job, Chunk, Made = TypeVar("Job"), TypeVar("Chunk"), TypeVar("Made")
THREADS = 3


def in_order(
    work: Callable[[Job, Chunk], Made], job: Job, chunks: Iterator[Chunk], workers: int
) -> Generator[Made, None, None]:
    """`work(job, chunk)` of every chunk in their order, whatever the number of workers; few are in memory at once.

    Raises:
        InputError: the system has killed a worker.
    """
    ahead = THREADS + 1 if workers == 1 else 2 * workers
    executor = _executor(workers)
    waiting = []
    try:
        while True:
            while len(waiting) <= ahead and (chunk := next(chunks, None)):
                waiting.append(_submit(executor, work, job, chunk))
            if not waiting:
                break
            yield waiting.pop(0).result()
    except BrokenExecutor as error:
        _give_up(executor)
        raise InputError(
            "a process that tokenises has been killed, most likely for want of memory; give fewer --workers"
        ) from error
    except BaseException:
        _give_up(executor)
        raise
    executor.shutdown(wait=True)


def _give_up(executor: Executor) -> None:
    """End the workers without waiting for their chunks.

    Chunks that wait for processes are not cancelled: a pool whose processes end meanwhile, as when a scheduler's signal
    goes to all of them, stumbles over a cancelled chunk and then waits for ever.
    """
    processes = getattr(executor, "_processes", None)  # of threads there are none
    for process in list((processes or {}).values()):
        process.kill()
    executor.shutdown(wait=True, cancel_futures=processes is None)


def _submit(executor: Executor, work: Callable[[Job, Chunk], Made], job: Job, chunk: Chunk) -> "Future[Made]":
    """Hand out a chunk. A process that is started for it never sees a terminal's Ctrl-C: it would answer by a traceback
    of its own, where this process ends it and says one line."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(work, job, chunk)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _executor(workers: int) -> Executor:
    """One worker is a few threads beside the reader: one lays rows out while the tokenizer library, which uses all
    cores, is at work for the others. More are processes with one core each."""
    if workers == 1:
        return ThreadPoolExecutor(THREADS)
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    """Keep the tokenizer library of a worker process to its own core, and end with the parent, however it ends."""
    from multiprocessing import parent_process

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_after, args=(parent_process(),), daemon=True).start()


def _exit_after(parent: "BaseProcess | None") -> None:
    """Leave this process as soon as its parent has gone: a killed parent cannot say goodbye."""
    if parent is not None:
        parent.join()
        os._exit(1)
