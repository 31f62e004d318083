"""Every change made to foreign code: what, why, for which versions. Nothing is changed anywhere else.

A patch is applied right after its module has been imported, by the hook in `adapter.py`, or at once if it is there
already. `tests/device` checks that each target still exists in the installed version.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from types import ModuleType

from torch import Tensor

from mindspeed_llm.device.gloo import SharedNetwork


@dataclass(frozen=True)
class Patch:
    """One change to a foreign module.

    Attributes:
        module, attribute: the target; the attribute may be dotted.
        devices: where it is applied.
        versions: versions of the owning package it was checked with.
        reason: what goes wrong without it.
        value: the new attribute.
    """

    module: str
    attribute: str
    devices: tuple[str, ...]
    versions: str
    reason: str
    value: Callable

    def apply(self, module: ModuleType) -> None:
        """Replace the target in the module just imported."""
        *path, name = self.attribute.split(".")
        owner = reduce(getattr, path, module)
        if not hasattr(owner, name):
            raise AttributeError(f"{self.module}.{self.attribute} is gone: see device/patches.py")
        setattr(owner, name, self.value)


def _identity(function: Callable) -> Callable:
    """A decorator that changes nothing."""
    return function


def _stay(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
    """`tensor.cuda()` where the CPU is the device."""
    return tensor


def _counts_on_host(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    """Token counts where the collectives want them: as numpy integers, or the tensor as it is."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


PATCHES = (
    Patch(
        module="torch",
        attribute="Tensor.cuda",
        devices=("cpu",),
        versions=">=2.7,<3",
        reason="megatron-core moves the last stage's copy of a tied embedding by weight.data.cuda(), which raises on "
        "a machine without a GPU; a method of torch's own tensors is out of reach of the scoped view",
        value=_stay,
    ),
    Patch(
        module="torch.distributed.distributed_c10d",
        attribute="ProcessGroupGloo",
        devices=("cpu",),
        versions=">=2.7,<3",
        reason="every group opens a network device with a thread that wakes up a hundred times a second, and has no "
        "option for another one",
        value=SharedNetwork,
    ),
    Patch(
        module="megatron.core.jit",
        attribute="jit_fuser",
        devices=("cpu",),
        versions=">=0.16,<0.17",
        reason="it is torch.compile: every decorated function would be compiled by a C++ compiler on first use, "
        "14-43 s per process, with no gain on a CPU",
        value=_identity,
    ),
    Patch(
        module="megatron.core.transformer.moe.token_dispatcher",
        attribute="maybe_move_tensor_to_cpu",
        devices=("cpu",),
        versions=">=0.16,<0.17",
        reason="it turns the counts of tokens per rank into numpy integers only on their way from a GPU; all_to_all "
        "raises TypeError for the tensors it leaves, so experts cannot be spread over processes",
        value=_counts_on_host,
    ),
)


def apply_now(device: str) -> None:
    """Apply the patches of `device` to modules that are imported already."""
    for patch in PATCHES:
        if device in patch.devices and patch.module in sys.modules:
            patch.apply(sys.modules[patch.module])


def by_module(device: str) -> dict[str, list[Callable[[ModuleType], None]]]:
    """Module name -> the patches of `device` to apply once it is imported."""
    table: dict[str, list[Callable[[ModuleType], None]]] = {}
    for patch in PATCHES:
        if device in patch.devices:
            table.setdefault(patch.module, []).append(patch.apply)
    return table
