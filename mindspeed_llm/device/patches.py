"""Every change made to foreign code: what, why, for which versions. Nothing is changed anywhere else.

A patch is applied right after its module has been imported, by the hook in `adapter.py`. `tests/device` checks that
each target still exists in the installed version.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Patch:
    """One change to a foreign module.

    Attributes:
        module, attribute: the target.
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
        if not hasattr(module, self.attribute):
            raise AttributeError(f"{self.module}.{self.attribute} is gone: see device/patches.py")
        setattr(module, self.attribute, self.value)


def _identity(function: Callable) -> Callable:
    """A decorator that changes nothing."""
    return function


PATCHES = (
    Patch(
        module="megatron.core.jit",
        attribute="jit_fuser",
        devices=("cpu",),
        versions=">=0.16,<0.17",
        reason="it is torch.compile: every decorated function would be compiled by a C++ compiler on first use, "
        "14-43 s per process, with no gain on a CPU",
        value=_identity,
    ),
)


def by_module(device: str) -> dict[str, list[Callable[[ModuleType], None]]]:
    """Module name -> the patches of `device` to apply once it is imported."""
    table: dict[str, list[Callable[[ModuleType], None]]] = {}
    for patch in PATCHES:
        if device in patch.devices:
            table.setdefault(patch.module, []).append(patch.apply)
    return table
