"""Merging an adapter, and changing the type of weights, as a source over another source.

    W' = W + alpha / r * B @ A        in float32, rounded once to the type of the result

(Upstream rounds B @ A, its scaling and the sum; up to 2 bf16 steps away from this.)
"""

import dataclasses
import threading

import torch

from mindspeed_llm.checkpoint.formats.lazy import TensorSource, narrow
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.open import LoraSource
from mindspeed_llm.errors import InputError


def merged_weight(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + scaling * B @ A in float32.

    Args:
        weight: [out, in].
        a: [r, in].
        b: [out, r].
    """
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling)


class MergedSource:
    """A base with an adapter merged in, and/or in another type (`TensorSource`)."""

    def __init__(self, base: TensorSource, lora: LoraSource | None = None, dtype: torch.dtype | None = None) -> None:
        """Wrap `base`.

        Args:
            lora: the adapter; None to change the type only.
            dtype: of every tensor read; None keeps each tensor's own.
        """
        self.base = base
        self.lora = lora
        self.result_dtype = dtype
        self.table = base.table
        self.config = base.config
        if dtype is not None:
            self.config = dataclasses.replace(base.config, dtype=str(dtype).removeprefix("torch."))
        self.adapted = set(lora.tensors.names()) if lora else set()
        self.lock = threading.Lock()
        self.last: tuple[str, torch.Tensor] | None = None

    def names(self) -> list[str]:
        """Logical names, those of the base."""
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values `read` returns."""
        return self.result_dtype or self.base.dtype(name)

    def read(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The logical tensor, or a box of it.

        A merged tensor is computed whole and then cut: its values must not depend on the layout that asks.
        """
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" not in self.adapted:
            return self.rounded(name, self.base.read(name, rows, columns))
        with self.lock:
            kept = self.last
        if kept is None or kept[0] != name:
            a, b = (self.lora.tensors.read(f"{module}.{factor}.weight") for factor in ("lora_A", "lora_B"))
            merged = merged_weight(self.base.read(name), a, b, self.lora.settings.scaling)
            kept = (name, self.rounded(name, merged))
            with self.lock:
                self.last = kept
        return narrow(kept[1], rows, columns)

    def rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """`values` in the result's type; `InputError` when a finite value would become infinite."""
        result = values.to(self.dtype(name))
        if result.dtype != values.dtype and result.dtype == torch.float16 and not torch.isfinite(result).all():
            largest = values.abs().max().item()
            raise InputError(
                f"{name}: {largest:g} does not fit float16 (at most 65504); choose --params-dtype bf16 or fp32"
            )
        return result
