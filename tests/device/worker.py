"""What a pool process, on the CPU device, says about its view of torch. Imports megatron-core."""

import importlib
import inspect
import sys
import types
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch

from mindspeed_llm import device
from mindspeed_llm.device.cpu import WORDS
from mindspeed_llm.device.patches import PATCHES
from mindspeed_llm.models import parallel


def strings(code: types.CodeType) -> Iterator[str]:
    """String constants of a code object, nested ones included."""
    for constant in code.co_consts:
        for one in constant if isinstance(constant, tuple) else (constant,):
            if isinstance(one, str):
                yield one
            elif isinstance(one, types.CodeType):
                yield from strings(one)


def words_of(module: types.ModuleType, wanted: Container[str]) -> set[str]:
    """Those of the wanted words that are constants of a module's functions."""
    found = set()
    for _, member in inspect.getmembers(module):
        functions = [f for _, f in inspect.getmembers(member)] if inspect.isclass(member) else [member]
        for function in functions:
            code = getattr(function, "__code__", None)
            if code is not None and getattr(function, "__module__", "") == module.__name__:
                found |= {word for word in strings(code) if word in wanted}
    return found


def view(rank: int) -> dict[str, Any]:
    """Facts about torch inside and outside megatron.core."""
    importlib.import_module("megatron.core.models.gpt")
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    modules = [m for name, m in sys.modules.items() if name.startswith("megatron.core") and m is not None]
    named = [m.torch for m in modules if isinstance(getattr(m, "torch", None), types.ModuleType)]
    inside = [one for one in named if not one.__name__.startswith("megatron.")]  # a module of its own is called so
    chosen = device.select()
    return {
        "same": chosen is device.select("cpu"),
        "backend": chosen.backend,
        "modules": len(inside),
        "current_device": {str(one.cuda.current_device()) for one in inside},
        "real_torch_inside": sum(one is torch for one in inside),
        "words_left": {m.__name__: words for m in modules if (words := words_of(m, WORDS))},
        "modules_that_say_cpu": sum(bool(words_of(m, ("cpu",))) for m in modules),
        "outside": (type(torch.cuda).__name__, torch.cuda.current_device.__module__, torch.cuda.is_available()),
        "bound_at_import": str(random.torch.cuda.current_device()),
        "made": str(random.torch.zeros(1, device=random.torch.cuda.current_device()).device),
    }


def generators(rank: int) -> tuple[bool, bool]:
    """(megatron-core's get/set of the device's generator is the CPU's, a fork draws apart and leaves it alone)."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    chosen = device.select()
    chosen.manual_seed(3)
    before = chosen.rng_state()
    same = torch.equal(before, random.torch.cuda.get_rng_state()) and torch.equal(before, torch.get_rng_state())
    random.model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0)
    chosen.set_rng_state(before)
    with random.get_cuda_rng_tracker().fork():
        inside = torch.rand(4)
    apart = torch.equal(chosen.rng_state(), before) and not torch.equal(inside, torch.rand(4))
    return same, apart


def patched(rank: int) -> dict[str, bool]:
    """Target -> whether it holds the patch's value on this device."""
    found = {}
    for patch in PATCHES:
        owner: Any = importlib.import_module(patch.module)
        for part in patch.attribute.split("."):
            owner = getattr(owner, part)
        found[f"{patch.module}.{patch.attribute}"] = owner is patch.value
    return found


def network_threads(rank: int) -> tuple[int, float]:
    """Threads that wait for the network after a few groups were made, and a sum over the last of the groups."""
    parallel.start(device.select("cpu"), 1, 1, None)
    groups = [torch.distributed.new_group() for _ in range(5)]
    total = torch.ones(3)
    for group in groups:
        torch.distributed.all_reduce(total, group=group)
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    parallel.stop()
    return names.count("gloo_tcp_loop"), float(total[0])
