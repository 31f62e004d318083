"""CUDA GPUs: nccl, megatron-core as it is."""

import torch

from mindspeed_llm.device import kernels
from mindspeed_llm.device.base import Device

MISSING = "torch sees no CUDA GPU (torch.cuda.is_available() is False)"

# No TransformerEngine or apex is needed, so nothing that lives there is switched on; torch's kernels serve.
ENGINE_CONFIG = {
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
}


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
        engine_config=dict(ENGINE_CONFIG),
    )
