"""The processes that tokenise: chunks of rows out, their tokens back in the same order."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

Job, Chunk, Made = TypeVar("Job"), TypeVar("Chunk"), TypeVar("Made")
THREADS = 3


def in_order(work: Callable[[Job, Chunk], Made], job: Job, chunks: Iterator[Chunk], workers: int) -> Iterator[Made]:
    """`work(job, chunk)` of every chunk in their order, whatever the number of workers; few are in memory at once."""
    ahead = THREADS + 1 if workers == 1 else 2 * workers
    with _executor(workers) as executor:
        waiting = []
        try:
            while True:
                while len(waiting) <= ahead and (chunk := next(chunks, None)):
                    waiting.append(_submit(executor, work, job, chunk))
                if not waiting:
                    return
                yield waiting.pop(0).result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


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
