"""What a merged weight has to be: W + alpha / r * B @ A in float64, rounded once.

The merge itself works in float32. Where the exact value lies so close to the middle between two values of the result's
type that float32 cannot tell on which side, both neighbours are right; everywhere else there is one right value.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.formats.lazy import TensorSource, narrow
from mindspeed_llm.checkpoint.kinds import Ranges

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
    """The deltas of Megatron LoRA adapters, each with its weight, by logical name."""

    def __init__(self, loras: Sequence[tuple[LoraSource, float]]) -> None:
        """`loras`: the opened adapters; their own settings say how each is scaled."""
        self.loras = [(lora, weight, set(lora.tensors.names())) for lora, weight in loras]
        self.table = self.loras[0][0].tensors.table

    @property
    def plain(self) -> bool:
        """Whether the adapters are nothing but pairs of factors."""
        return not any(lora.whole() or lora.magnitudes or lora.unties for lora, _, _ in self.loras)

    @property
    def inside_layers(self) -> bool:
        """Whether every pair belongs to a module of a decoder layer."""
        return all(module.startswith("decoder.layers.") for module in self.modules())

    def modules(self) -> set[str]:
        """The logical modules with a pair."""
        return {module for lora, _, _ in self.loras for module in lora.modules()}

    def adapts(self, name: str) -> bool:
        """Whether a logical tensor has a delta."""
        factor = f"{name.removesuffix('.weight')}.lora_A.weight"
        return any(factor in held for _, _, held in self.loras)

    def pairs(self, module: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """A [r, in] and B [out, r] in float32, and weight x alpha / r, of each adapter of a module."""
        for lora, weight, held in self.loras:
            if f"{module}.lora_A.weight" in held:
                a, b = (lora.tensors.read(f"{module}.{factor}.weight").float() for factor in ("lora_A", "lora_B"))
                yield a, b, weight * lora.settings.scaling(module)

    def delta(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> Delta | None:
        """The delta of (a box of) a logical tensor; None where it is not adapted."""
        found = []
        for a, b, scaling in self.pairs(name.removesuffix(".weight")):
            a, b = narrow(a, None, columns), narrow(b, rows)
            scale = abs(scaling) * (b.abs() @ a.abs()).double()
            found.append(Delta(scaling * (b.double() @ a.double()), scale, a.shape[0]))
        return total(found)


def total(deltas: Sequence[Delta]) -> Delta | None:
    """The sum of deltas; None of none."""
    if not deltas:
        return None
    first, *others = deltas
    for one in others:
        first = Delta(first.value + one.value, first.scale + one.scale, first.rank + one.rank)
    return first


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
