"""What the engine asks of a device, whatever it is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mindspeed_llm.device.grouped import GroupedProducts
from mindspeed_llm.device.profiler import Profiler

# megatron-core fields that keep it to plain torch: no TransformerEngine, apex or vendor kernel is needed.
PLAIN_TORCH = {
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
}


@dataclass(frozen=True)
class Device:
    """One kind of device as the engine sees it; made by `device.select`.

    Attributes:
        name: "cpu", "cuda" or "npu".
        backend: torch.distributed backend for the default process group.
        engine_config: fields every megatron-core `TransformerConfig` gets on this device.
        torch_device: process-local index -> device that holds parameters and activations.
        set_current: make that device the process's current one.
        memory: -> (allocated, peak) bytes of this process: device memory, or resident memory on a CPU.
        capacity: -> bytes that tensors can have: all memory of a card; on a CPU the free memory of the machine, which
            processes share.
        rng_state / set_rng_state: the device's default generator.
        manual_seed: seed that generator.
        synchronize: wait until submitted work is done.
        grouped: products of groups of rows, each with a matrix of its own (experts).
        attention: attention over [b, heads, s, d] tensors, with `kernels.sdpa`'s arguments.
        rms_norm: class of the norm layers: (config, hidden_size, eps) -> module.
        profiler: trace file -> what records into it.
    """

    name: str
    backend: str
    torch_device: Callable[[int], torch.device]
    set_current: Callable[[int], None]
    memory: Callable[[], tuple[int, int]]
    capacity: Callable[[], int]
    rng_state: Callable[[], torch.Tensor]
    set_rng_state: Callable[[torch.Tensor], None]
    manual_seed: Callable[[int], None]
    synchronize: Callable[[], None]
    attention: Callable[..., torch.Tensor]
    rms_norm: type[torch.nn.Module]
    profiler: Callable[[Path], Profiler]
    grouped: GroupedProducts = field(default_factory=GroupedProducts)
    engine_config: dict[str, Any] = field(default_factory=dict)
