"""CUDA GPUs: nccl, megatron-core as it is."""

import torch

from mindspeed_llm.device import kernels
from mindspeed_llm.device.base import PLAIN_TORCH, Device

MISSING = "torch sees no CUDA GPU (torch.cuda.is_available() is False)"


def available() -> bool:
    """Whether torch sees a CUDA GPU."""
    return torch.cuda.is_available()


def create() -> Device:
    """Describe the CUDA device; megatron-core needs no change."""
    return Device(
        name="cuda",
        backend="nccl",
        torch_device=lambda index: torch.device("cuda", index),
        set_current=torch.cuda.set_device,
        memory=lambda: (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()),
        rng_state=torch.cuda.get_rng_state,
        set_rng_state=torch.cuda.set_rng_state,
        manual_seed=torch.cuda.manual_seed,
        synchronize=torch.cuda.synchronize,
        attention=kernels.sdpa,
        rms_norm=kernels.RMSNorm,
        engine_config=dict(PLAIN_TORCH),
    )
