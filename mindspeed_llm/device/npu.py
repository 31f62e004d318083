"""Ascend NPUs: hccl, torch_npu and MindSpeed's adaptor. Written from their documentation; never run on a card here."""

from importlib import import_module
from importlib.util import find_spec

import torch

from mindspeed_llm.device import kernels
from mindspeed_llm.device.base import PLAIN_TORCH, Device
from mindspeed_llm.errors import InputError

MISSING = "torch_npu is not installed, or it sees no Ascend NPU (is CANN's set_env.sh sourced?)"


def available() -> bool:
    """Whether torch_npu is installed and sees a card."""
    if find_spec("torch_npu") is None:
        return False
    import_module("torch_npu")
    return torch.npu.is_available()


def create() -> Device:
    """Load MindSpeed's adaptor for megatron-core and describe the NPU.

    Raises:
        InputError: MindSpeed is not installed; megatron-core does not run on an NPU without it.
    """
    if find_spec("mindspeed") is None:
        raise InputError(
            "--device npu needs MindSpeed (branch core_r0.16.0), which adapts megatron-core to Ascend; "
            "install it, or use --device cpu"
        )
    import_module("mindspeed.megatron_adaptor")
    return Device(
        name="npu",
        backend="hccl",
        torch_device=lambda index: torch.device("npu", index),
        set_current=torch.npu.set_device,
        memory=lambda: (torch.npu.memory_allocated(), torch.npu.max_memory_allocated()),
        rng_state=torch.npu.get_rng_state,
        set_rng_state=torch.npu.set_rng_state,
        manual_seed=torch.npu.manual_seed,
        synchronize=torch.npu.synchronize,
        attention=kernels.sdpa,
        rms_norm=kernels.RMSNorm,
        engine_config=dict(PLAIN_TORCH),
    )
