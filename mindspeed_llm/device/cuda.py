"""CUDA GPUs: nccl, megatron-core as it is."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.device import kernels
from mindspeed_llm.device.base import PLAIN_TORCH, Device
from mindspeed_llm.device.profiler import TorchProfiler
from mindspeed_llm.device.segments import Segments, flash_segments, flash_serves

MISSING = "torch sees no CUDA GPU (torch.cuda.is_available() is False)"


def available() -> bool:
    """Whether torch sees a CUDA GPU."""
    return torch.cuda.is_available()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
    window: int | None = None,
    segments: Segments | None = None,
    **features: Any,
) -> Tensor:
    """`kernels.sdpa`, with all segments in one flash call where that kernel serves."""
    limits = (features.get("softcap"), features.get("sinks"), dropout)
    if segments is not None and causal and flash_serves(query, value, *limits):
        return flash_segments(query, key, value, segments, scale, window)
    features |= {"causal": causal, "scale": scale, "dropout": dropout, "window": window, "segments": segments}
    return kernels.sdpa(query, key, value, **features)


def create() -> Device:
    """Describe the CUDA device; megatron-core needs no change."""
    return Device(
        name="cuda",
        backend="nccl",
        torch_device=lambda index: torch.device("cuda", index),
        set_current=torch.cuda.set_device,
        memory=lambda: (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()),
        capacity=lambda: torch.cuda.mem_get_info()[1],
        rng_state=torch.cuda.get_rng_state,
        set_rng_state=torch.cuda.set_rng_state,
        manual_seed=torch.cuda.manual_seed,
        synchronize=torch.cuda.synchronize,
        attention=attention,
        rms_norm=kernels.RMSNorm,
        profiler=partial(TorchProfiler, accelerator=True),
        engine_config=dict(PLAIN_TORCH),
    )
