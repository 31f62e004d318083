"""CUDA GPUs: nccl, megatron-core as it is."""

from functools import partial

import torch

from mindspeed_llm.device import kernels
from mindspeed_llm.device.base import PLAIN_TORCH, Device
from mindspeed_llm.device.grouped import GroupedProducts, KernelProducts, torch_kernel
from mindspeed_llm.device.profiler import TorchProfiler
from mindspeed_llm.device.segments import flash_segments

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
        capacity=lambda: torch.cuda.mem_get_info()[1],
        rng_state=torch.cuda.get_rng_state,
        set_rng_state=torch.cuda.set_rng_state,
        manual_seed=torch.cuda.manual_seed,
        synchronize=torch.cuda.synchronize,
        attention=kernels.attention_with(flash_segments),
        rms_norm=kernels.RMSNorm,
        profiler=partial(TorchProfiler, accelerator=True),
        grouped=KernelProducts(torch_kernel) if hasattr(torch.nn.functional, "grouped_mm") else GroupedProducts(),
        engine_config=dict(PLAIN_TORCH),
    )
