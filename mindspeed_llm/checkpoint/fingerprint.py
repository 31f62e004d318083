"""One number for the weights of a model, the same for the HF folder, any layout of it, and the export back."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor

import torch

from mindspeed_llm.checkpoint.formats.blocks import part_blocks
from mindspeed_llm.checkpoint.formats.lazy import TensorSource

THREADS = 2
"""Reading and hashing release the interpreter lock; each thread holds one block in memory."""


def part_line(source: TensorSource, name: str, part: int, stopped: Callable[[], bool]) -> str:
    """Name, type, shape and sha256 of the values of one HF part of a logical tensor; see `content_hash`."""
    entry = source.table.entry(name)
    shape = entry.hf_shape(part)
    digest = hashlib.sha256()
    for _, values in part_blocks(source, name, entry.hf_map(), part, shape):
        if stopped():
            raise CancelledError
        digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{entry.hf[part]} {source.dtype(name)} {list(shape)} {digest.hexdigest()}"


def content_hash(source: TensorSource, threads: int = THREADS, stopped: Callable[[], bool] = lambda: False) -> str:
    """sha256 over name, type, shape and values of every HF tensor, by name.

    Vocabulary padding, tensor and pipeline splits and the copy of a tied output layer do not enter.

    Args:
        stopped: asked now and then; once it says True nobody needs the number any more, and `CancelledError` is raised.
    """

    def lines(name: str) -> list[str]:
        return [part_line(source, name, part, unwanted) for part in range(len(source.table.entry(name).hf))]

    interrupted = threading.Event()

    def unwanted() -> bool:
        return interrupted.is_set() or stopped()

    with ThreadPoolExecutor(threads) as pool:
        try:
            found = [line for group in pool.map(lines, source.names()) for line in group]
        except BaseException:  # leaving the block waits for the threads: they are to end now
            interrupted.set()
            raise
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()
