"""The processes that tokenise: chunks of rows out, their tokens back in the same order."""

import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mindspeed_llm.errors import InputError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Job, Chunk, Made = TypeVar("Job"), TypeVar("Chunk"), TypeVar("Made")
THREADS = 3
GRACE_SECONDS = 1.0  # for a process to be seen to have ended
AHEAD = 2  # chunks that wait for each process, so that it has the next one at hand


def in_order(
    work: Callable[[Job, Chunk], Made], job: Job, chunks: Iterator[Chunk], workers: int
) -> Generator[Made, None, None]:
    """`work(job, chunk)` of every chunk in their order, whatever the number of workers; few are in memory at once.

    Raises:
        InputError: the system has killed a worker.
    """
    pool: _Threads[Job, Chunk, Made] | _Processes[Job, Chunk, Made]
    pool = _Threads(work, job) if workers == 1 else _Processes(work, job, workers)
    with pool:
        waiting = 0
        while True:
            while waiting <= pool.ahead and (chunk := next(chunks, None)):
                pool.give(chunk)
                waiting += 1
            if not waiting:
                return
            yield pool.take()
            waiting -= 1


class _Threads(Generic[Job, Chunk, Made]):
    """A few threads beside the reader: one lays rows out while the tokenizer library, which uses all cores, is at work
    for the others."""

    def __init__(self, work: Callable[[Job, Chunk], Made], job: Job) -> None:
        from concurrent.futures import Future, ThreadPoolExecutor

        self.ahead = THREADS + 1
        self._work, self._job = work, job
        self._executor = ThreadPoolExecutor(THREADS)
        self._waiting: deque[Future[Made]] = deque()

    def __enter__(self) -> "_Threads[Job, Chunk, Made]":
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def give(self, chunk: Chunk) -> None:
        self._waiting.append(self._executor.submit(self._work, self._job, chunk))

    def take(self) -> Made:
        return self._waiting.popleft().result()


class _Processes(Generic[Job, Chunk, Made]):
    """Processes with one core each, in turn, over a connection each.

    Not the standard library's pool: its processes share one pipe for results, and one that is killed while it sends
    leaves the others, and whoever ends them, waiting for ever.
    """

    def __init__(self, work: Callable[[Job, Chunk], Made], job: Job, workers: int) -> None:
        self.ahead = AHEAD * workers
        self._work, self._job, self._workers = work, job, workers
        self._members: list[tuple[Any, Connection]] = []
        self._given = self._taken = 0

    def __enter__(self) -> "_Processes[Job, Chunk, Made]":
        return self

    def __exit__(self, *error: object) -> None:
        for process, _ in self._members:
            process.kill()  # none has anything to write
        for process, connection in self._members:
            process.join()
            connection.close()

    def give(self, chunk: Chunk) -> None:
        """Hand a chunk to the process whose turn it is; the first ones start theirs."""
        if self._given < self._workers:
            self._start()
        try:
            self._members[self._given % self._workers][1].send(chunk)
        except OSError as error:
            raise self._ended() from error
        self._given += 1

    def take(self) -> Made:
        from multiprocessing.connection import wait

        connection = self._members[self._taken % self._workers][1]
        if connection not in wait([connection, *(process.sentinel for process, _ in self._members)]):
            raise self._ended()
        try:
            made, error, trace = connection.recv()
        except (EOFError, OSError) as gone:
            raise self._ended() from gone
        self._taken += 1
        if error is not None:
            raise error from (None if isinstance(error, InputError) else RuntimeError(f"in a worker process:\n{trace}"))
        return made

    def _ended(self) -> Exception:
        """What to say of processes that have gone."""
        from multiprocessing.connection import wait

        wait([process.sentinel for process, _ in self._members], GRACE_SECONDS)
        statuses = [process.exitcode for process, _ in self._members if process.exitcode]
        if not statuses or min(statuses) < 0:  # by a signal
            why = "has been killed, most likely for want of memory; give fewer --workers"
            return InputError(f"a process that tokenises {why}")
        return RuntimeError(f"a process that tokenises has ended with status {statuses[0]}; its error stands above")

    def _start(self) -> None:
        """Start one more process, whole: an interrupt waits until it is known here.

        The process inherits that it sees neither a terminal's Ctrl-C, to which it would answer by a traceback of its
        own, nor a scheduler's cancel: this process ends it and says one line.
        """
        from multiprocessing import get_context, resource_tracker

        context = get_context("spawn")
        resource_tracker.ensure_running()  # its own start would end the block below
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(self._work, self._job, theirs), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, connection))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(work: Callable[[Job, Chunk], Made], job: Job, connection: "Connection") -> None:
    """A worker process: answer every chunk by (what is made of it, error, traceback), in their order.

    Chunks are taken in beside the work, so that whoever sends one never waits for one that sends results.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    chunks: SimpleQueue[Chunk] = SimpleQueue()
    threading.Thread(target=_take_in, args=(connection, chunks), daemon=True).start()
    while True:
        chunk = chunks.get()
        answer: tuple[Made | None, BaseException | None, str]
        try:
            answer = work(job, chunk), None, ""
        except Exception as error:
            answer = None, _portable(error), traceback.format_exc()
        connection.send(answer)


def _portable(error: Exception) -> Exception:
    """The error, or its text where it cannot travel between processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))
    return error


def _take_in(connection: "Connection", chunks: "SimpleQueue[Chunk]") -> None:
    """Move chunks from the connection into the queue; leave this process when the other end has gone, however it went:
    a killed parent cannot say goodbye."""
    while True:
        try:
            chunk = connection.recv()
        except (EOFError, OSError):
            os._exit(1)
        chunks.put(chunk)
