"""What a merged weight has to be: W + alpha / r * B @ A in float64, rounded once.

The merge itself works in float32. Where the exact value lies so close to the middle between two values of the result's
type that float32 cannot tell on which side, both neighbours are right; everywhere else there is one right value.
"""

from typing import NamedTuple

import torch

from mindspeed_llm.checkpoint.formats.lazy import TensorSource, narrow
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.open import LoraSource

FLOAT32_STEP = 2.0**-24
"""Largest relative error of one float32 operation."""


class Delta(NamedTuple):
    """What an adapter adds to (a box of) a weight.

    Attributes:
        value: scaling * B @ A, float64.
        scale: |scaling| * |B| @ |A|, to which the errors of a float32 product are relative.
        rank: summands of each element.
    """

    value: torch.Tensor
    scale: torch.Tensor
    rank: int


class Right(NamedTuple):
    """The right values of a tensor, in the result's type: `nearest`, and anything from `low` to `high`."""

    nearest: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def among(self, found: torch.Tensor | None) -> torch.Tensor:
        """The right value nearest to a found one; `nearest` when nothing was found."""
        if found is None or found.shape != self.nearest.shape:
            return self.nearest
        return torch.minimum(torch.maximum(found.to(self.nearest.dtype), self.low), self.high)


def right_values(weight: torch.Tensor, delta: Delta | None, dtype: torch.dtype) -> Right:
    """The right values of a weight with an adapter merged in, and/or in another type."""
    if delta is None:
        rounded = weight.to(dtype)
        return Right(rounded, rounded, rounded)
    exact = weight.double() + delta.value
    error = (delta.rank + 3) * FLOAT32_STEP * (weight.double().abs() + delta.scale)
    return Right(exact.to(dtype), (exact - error).to(dtype), (exact + error).to(dtype))


class Adapter:
    """The deltas of a Megatron LoRA, by logical name."""

    def __init__(self, lora: LoraSource) -> None:
        """`lora`: the opened adapter; its own settings say how it is scaled."""
        self.lora = lora
        self.held = set(lora.tensors.names())

    def adapts(self, name: str) -> bool:
        """Whether a logical tensor has a delta."""
        return f"{name.removesuffix('.weight')}.lora_A.weight" in self.held

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A [r, in] and B [out, r] in float32, and the scaling alpha / r."""
        module, settings = name.removesuffix(".weight"), self.lora.settings
        a, b = (self.lora.tensors.read(f"{module}.{factor}.weight").float() for factor in ("lora_A", "lora_B"))
        return a, b, settings.alpha / settings.r

    def delta(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> Delta | None:
        """The delta of (a box of) a logical tensor; None where it is not adapted."""
        if not self.adapts(name):
            return None
        a, b, scaling = self.factors(name)
        a, b = narrow(a, None, columns), narrow(b, rows)
        return Delta(scaling * (b.double() @ a.double()), abs(scaling) * (b.abs() @ a.abs()).double(), a.shape[0])


class ExactSource:
    """A base with an adapter merged in exactly and rounded once, and/or in another type (`TensorSource`)."""

    def __init__(
        self,
        base: TensorSource,
        adapter: Adapter | None,
        dtype: torch.dtype | None,
        found: TensorSource | None = None,
    ) -> None:
        """Wrap `base`.

        Args:
            dtype: of the result's tensors; None keeps each tensor's own.
            found: the result: where two values are right, its value is taken.
        """
        self.base, self.adapter, self.result_dtype, self.found = base, adapter, dtype, found
        self.config, self.table = base.config, base.table

    def names(self) -> list[str]:
        """Logical names, those of the base."""
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values `read` returns: the result's, where there is one that may keep a tensor's own."""
        own = self.base.dtype(name)
        if self.found is not None and self.table.entry(name).row.keep_dtype and self.found.dtype(name) == own:
            return own
        return self.result_dtype or own

    def right(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> Right:
        """The right values of (a box of) a logical tensor."""
        delta = self.adapter.delta(name, rows, columns) if self.adapter else None
        return right_values(self.base.read(name, rows, columns), delta, self.dtype(name))

    def read(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The logical tensor, or a box of it; the result's own value where it is one of two right ones."""
        right = self.right(name, rows, columns)
        if self.found is None or torch.equal(right.low, right.high):
            return right.nearest
        return right.among(self.found.read(name, rows, columns))
