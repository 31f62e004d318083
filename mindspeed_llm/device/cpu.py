"""Plain CPUs: gloo, and a view of torch in which megatron-core's device is the CPU."""

import contextlib
import resource
import types
from typing import Any

import torch

from mindspeed_llm.device import adapter, cpu_attention, cpu_kernels, gloo, patches
from mindspeed_llm.device.base import PLAIN_TORCH, Device
from mindspeed_llm.device.profiler import TorchProfiler

MISSING = "a CPU is always there"
CPU = torch.device("cpu")

# Where megatron-core names its device in text, and what the CPU's tensors answer.
WORDS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


def available() -> bool:
    """Always."""
    return True


def memory() -> tuple[int, int]:
    """(resident now, peak resident) bytes of this process, from the kernel's accounting."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        now = int(statm.read().split()[1]) * resource.getpagesize()
    return now, max(now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # the kernel counts peaks late


def free_memory() -> int:
    """Bytes of RAM that new processes can have, from the kernel's accounting."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        found = dict(line.split(":") for line in lines)
    return int(found["MemAvailable"].split()[0]) * 1024


class _Stream:
    """A stream or event on a device whose work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = record = wait = synchronize = _nothing

    def record_event(self, event: Any = None) -> "_Stream":
        """An event that has happened."""
        return _Stream()

    def query(self) -> bool:
        """Work on a CPU is always complete."""
        return True

    def elapsed_time(self, other: "_Stream") -> float:
        """Milliseconds; nothing is measured here."""
        return 0.0


class _Generators:
    """`default_generators[i]` is the CPU's one generator for every i."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def namespace() -> types.ModuleType:
    """What megatron-core sees as torch.cuda: the CPU's generator, no streams, no device memory pool."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    random = {
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
        "initial_seed": torch.initial_seed,
        "default_generators": _Generators(),
    }
    nvtx = dict.fromkeys(("range_push", "range_pop", "mark"), nothing)
    nvtx["range"] = contextlib.nullcontext
    return adapter.ModuleView(
        torch.cuda,
        {
            **random,
            "random": types.SimpleNamespace(**random),
            "current_device": lambda: CPU,
            "device_count": lambda: 1,
            "device": contextlib.nullcontext,
            "stream": contextlib.nullcontext,
            "Stream": _Stream,
            "Event": _Stream,
            "current_stream": _Stream,
            "default_stream": _Stream,
            "set_stream": nothing,
            "set_device": nothing,
            "synchronize": nothing,
            "empty_cache": nothing,
            "memory_allocated": lambda *a: memory()[0],
            "max_memory_allocated": lambda *a: memory()[1],
            "reset_peak_memory_stats": nothing,
            "nvtx": types.SimpleNamespace(**nvtx),
            "_lazy_call": lambda call, **kwargs: call(),
            "_lazy_init": nothing,
        },
    )


def create() -> Device:
    """Install the scoped view of torch and describe the CPU."""
    cpu_kernels.keep_freed_memory()
    patches.apply_now("cpu")
    distributed = adapter.ModuleView(torch.distributed, {"all_gather": gloo.all_gather})
    replaced = {"cuda": namespace(), "distributed": distributed}
    adapter.install("megatron.core", replaced, WORDS, patches.by_module("cpu"))
    return Device(
        name="cpu",
        backend="gloo",
        torch_device=lambda index: CPU,
        set_current=lambda index: None,
        memory=memory,
        capacity=free_memory,
        rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        manual_seed=lambda seed: torch.manual_seed(seed) and None,
        synchronize=lambda: None,
        attention=cpu_attention.attention,
        rms_norm=cpu_kernels.RMSNorm,
        profiler=TorchProfiler,
        grouped=cpu_kernels.GroupedProducts(),
        engine_config=dict(PLAIN_TORCH),
    )
