"""Processes that have imported the engine once, and of which those of the pools are forked in a moment.

Importing torch, megatron-core, transformers and peft takes four seconds, in every process of every pool. Here it is
done once for each rank: ranks hash strings with seeds of their own, as the processes of a launcher do, so that an
order that depends on a set still differs between them.
"""

import functools
import multiprocessing
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

PRELOADED = "tests.distributed.preloaded"


@functools.cache
def _seed(rank: int) -> forkserver.ForkServer:
    """The process from which those of `rank` are forked; it ends with the last that knows it."""
    seed = forkserver.ForkServer()
    seed.set_forkserver_preload([PRELOADED])
    return seed


def sow(size: int) -> None:
    """Start the seeds of `size` ranks, so that they import at the same time."""
    for rank in range(size):
        _seed(rank).ensure_running()


def forked(rank: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> BaseProcess:
    """Start `target(*arguments)` in a process forked from its rank's seed."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments, daemon=True)
    with mock.patch.object(forkserver, "connect_to_new_process", _seed(rank).connect_to_new_process):
        process.start()
    return process
