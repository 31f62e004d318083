"""Process pools for tests: real processes over gloo, started once per world size, one task after another.

A task is a module-level function `task(rank, **arguments)`; every process runs it and returns its result. When one
fails, the error carries every process's traceback.
"""

import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT = 240  # seconds a task may take


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    """One process: join the group, then run tasks until the pipe closes."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), MINDSPEED_LLM_DEVICE="cpu", OMP_NUM_THREADS="1")
    import torch

    from mindspeed_llm import device

    torch.set_num_threads(1)
    chosen = device.select("cpu")
    from mindspeed_llm.models import parallel

    parallel.connect(chosen)
    while True:
        try:
            task, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, task(rank, **arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


class Pool:
    """`size` processes that share one default process group."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, task: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Run `task(rank, **arguments)` on every process; -> results by rank.

        Raises:
            AssertionError: a process failed, died or hung; the message holds every traceback.
        """
        for pipe in self.pipes:
            pipe.send((task, arguments))
        answers, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            try:
                done = pipe.poll(30 if failures else TIMEOUT)
                answer = pipe.recv() if done else (False, f"no answer after {TIMEOUT} s")
            except (EOFError, ConnectionError):
                answer = (False, f"the process died with exit code {self.processes[rank].exitcode}")
            answers.append(answer)
            if not answer[0]:
                failures.append(f"--- rank {rank} ---\n{answer[1]}")
        if failures:
            self.close()
            raise AssertionError(f"{task.__name__} failed on {self.size} processes\n" + "\n".join(failures))
        return [value for _, value in answers]

    def close(self) -> None:
        """End the processes; the next `pool(size)` starts fresh ones."""
        for process in self.processes:
            process.kill()
            process.join()
        if pool.cache_info().currsize:
            pool.cache_clear()


@functools.cache
def pool(size: int) -> Pool:
    """The pool of `size` processes, started on first use and kept until the tests end."""
    return Pool(size)
