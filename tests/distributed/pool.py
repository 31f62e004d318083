"""Process pools for tests: real processes over gloo, forked once per world size, one task after another.

A task is a module-level function `task(rank, **arguments)`; every process runs it and returns its result. A task named
by its address ("package.module:function") is imported in the processes alone, after they have chosen their device, so
that pytest's own process need not import megatron-core. When one process fails, the error carries every process's
traceback, also those of processes that wait for the failed one.
"""

import atexit
import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from tests.conftest import free_port, unsynced
from tests.distributed import seeds

TIMEOUT = 240.0  # seconds a task may take
LARGEST = 3 << 28  # resident bytes of a process beyond which its pool is started anew
GRACE = 5.0  # seconds the other processes get to answer once one has failed

Task = Callable[..., Any] | str


def join_group(rank: int) -> None:
    """Become one process of a job on CPUs: one thread, device chosen, default process group joined."""
    import torch

    from mindspeed_llm import device

    torch.set_num_threads(1)
    chosen = device.select("cpu")
    from mindspeed_llm.models import parallel

    parallel.connect(chosen)


def _resolve(task: Task) -> Callable[..., Any]:
    """The task itself, or the one at "package.module:function"."""
    if not isinstance(task, str):
        return task
    module, _, name = task.partition(":")
    return getattr(importlib.import_module(module), name)


class _Leftovers:
    """What a task leaves behind: its modules, which stay, and its engines, which go."""

    def __init__(self) -> None:
        self.modules = 0

    def forget(self) -> None:
        """Drop what the last task built: process groups end, with their threads, when nothing knows them any more.

        The million objects of modules once imported are then set aside, so that the next search for cycles, here and
        in the program itself, need not go through them: that took longer than many a task.
        """
        rotary = sys.modules.get("megatron.core.models.common.embeddings.rotary_pos_embedding")
        if rotary is not None:
            rotary.RotaryEmbedding.forward.cache_clear()  # remembers its callers, and through their hooks all the rest
        gc.collect()
        if len(sys.modules) > self.modules:
            self.modules = len(sys.modules)
            gc.freeze()


def _serve(rank: int, environment: dict[str, str], stacks: str, pipe: Any, prepare: Callable[[int], None]) -> None:
    """One process: prepare, then run tasks until the pipe closes."""
    os.environ.update(environment)
    os.fsync = unsynced
    with open(stacks, "w", encoding="utf-8") as dump:
        faulthandler.register(signal.SIGUSR1, file=dump, all_threads=False)
        prepare(rank)
        leftovers = _Leftovers()
        leftovers.forget()
        while True:
            try:
                task, arguments = pipe.recv()
            except EOFError:
                return
            try:
                answer = (True, _resolve(task)(rank, **arguments))
            except BaseException:
                answer = (False, traceback.format_exc())
            pipe.send(answer)
            del answer, task, arguments
            leftovers.forget()


def _spawned(rank: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> BaseProcess:
    """Start `target(*arguments)` in a process that has imported nothing."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


class Pool:
    """`size` processes that share one default process group.

    Args:
        size: number of processes.
        prepare: what each does first; the default joins them over gloo.
        bare: start them without the engine, which others have imported when they start.
    """

    def __init__(self, size: int, prepare: Callable[[int], None] = join_group, bare: bool = False) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory(prefix="pool-")
        if not bare:
            seeds.sow(size)
        start = _spawned if bare else seeds.forked
        port = str(free_port())
        self.pipes, self.processes = [], []
        for rank in range(size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "MINDSPEED_LLM_DEVICE": "cpu",
                "OMP_NUM_THREADS": "1",
            }
            ours, theirs = multiprocessing.Pipe()
            arguments = (rank, environment, self._stacks(rank), theirs, prepare)
            self.processes.append(start(rank, _serve, arguments))
            theirs.close()
            self.pipes.append(ours)

    def _stacks(self, rank: int) -> str:
        return os.path.join(self.folder.name, f"rank{rank}")

    def run(self, task: Task, timeout: float = TIMEOUT, **arguments: Any) -> list[Any]:
        """Run `task(rank, **arguments)` on every process; -> results by rank.

        Args:
            task: a function, or its address "package.module:function".
            timeout: seconds it may take.

        Raises:
            AssertionError: a process failed, died or hung; the message holds every traceback. The pool is closed.
        """
        for pipe in self.pipes:
            try:
                pipe.send((task, arguments))
            except ConnectionError:  # a dead process is reported below, with its exit code
                continue
        answers = self._collect(timeout)
        failures = [f"--- rank {rank} ---\n{text}" for rank, (good, text) in sorted(answers.items()) if not good]
        if failures:
            self.close()
            name = task if isinstance(task, str) else task.__name__
            raise AssertionError(f"{name} failed on {self.size} processes\n" + "\n".join(failures))
        return [answers[rank][1] for rank in range(self.size)]

    def _collect(self, timeout: float) -> dict[int, tuple[bool, Any]]:
        """Rank -> (succeeded, result or traceback), waiting no longer than GRACE after the first failure."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers}
            ready = wait(list(waiting), max(deadline - time.monotonic(), 0))
            if not ready:
                for rank in waiting.values():
                    answers[rank] = (False, f"no answer; it is at\n{self._where(rank)}")
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionError):
                    self.processes[rank].join(GRACE)
                    answers[rank] = (False, f"the process died with exit code {self.processes[rank].exitcode}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _where(self, rank: int) -> str:
        """The stack of a process that does not answer."""
        os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.3)
        with open(self._stacks(rank), encoding="utf-8") as dump:
            return dump.read()

    def resident(self) -> int:
        """Bytes of the largest process, what it shares with others included; 0 where the system does not tell."""
        largest = 0
        for process in self.processes:
            with contextlib.suppress(OSError), open(f"/proc/{process.pid}/statm", encoding="ascii") as statm:
                largest = max(largest, int(statm.read().split()[1]) * resource.getpagesize())
        return largest

    def close(self) -> None:
        """End the processes; the next `pool(size)` starts fresh ones."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.folder.cleanup()
        if _pools.get(self.size) is self:
            del _pools[self.size]


_pools: dict[int, Pool] = {}


def pool(size: int) -> Pool:
    """The pool of `size` processes, started on first use and kept until the tests end or it has grown large.

    Engines of some layouts are never freed (torch's graph keeps what its hooks know), and new processes are there in a
    moment. No task may count on what an earlier one left in its process.
    """
    if size in _pools and _pools[size].resident() > LARGEST:
        _pools[size].close()
    if size not in _pools:
        _pools[size] = Pool(size)
    return _pools[size]


@atexit.register
def close_pools() -> None:
    """End every pool; runs by itself when the tests' process ends."""
    for one in list(_pools.values()):
        one.close()
