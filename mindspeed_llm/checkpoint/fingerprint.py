"""One number for the weights of a model, the same for the HF folder, any layout of it, and the export back."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch

from mindspeed_llm.checkpoint.formats.hf import hf_parts
from mindspeed_llm.checkpoint.formats.lazy import TensorSource

THREADS = 2
"""Reading and hashing release the interpreter lock; each thread holds one tensor in memory."""


def tensor_hash(values: torch.Tensor) -> str:
    """sha256 of a tensor's bytes."""
    flat = values.contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy() if flat.numel() else b"").hexdigest()


def content_hash(source: TensorSource, threads: int = THREADS) -> str:
    """sha256 over name, type, shape and values of every HF tensor, by name.

    Vocabulary padding, tensor and pipeline splits and the copy of a tied output layer do not enter.
    """

    def lines(name: str) -> list[str]:
        return [f"{hf} {part.dtype} {list(part.shape)} {tensor_hash(part)}" for hf, part in hf_parts(source, name)]

    with ThreadPoolExecutor(threads) as pool:
        found = [line for group in pool.map(lines, source.names()) for line in group]
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()
