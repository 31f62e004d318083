"""Adapters of all experts of a layer at once: the grouped form of `layers` (modular) and of `fused`.

Rows X_e of expert e, sorted by expert; s = alpha / r:

    forward   low_e = s X_e A_e^T     Y_e  = X_e W_e^T + low_e B_e^T      dB_e = dY_e^T low_e
    backward  low'_e = s dY_e B_e     dX_e = dY_e W_e  + low'_e A_e       dA_e = low'_e^T X_e

Each of these is one grouped product over all experts (`device.grouped`). Nothing is communicated: the dispatcher moves
the rows. The factors stay parameters of their own, one A and one B per expert.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_llm.device.grouped import GroupedProducts
from mindspeed_llm.lora.dropout import Dropout
from mindspeed_llm.lora.layers import ParallelLora
from mindspeed_llm.models.experts import LAYERS, GroupedExperts, GroupedLinear, grouped_linear


class _GroupedLora(torch.autograd.Function):
    """The module's equations, for frozen W."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        sizes: Sequence[int],
        scaling: float,
        grouped: GroupedProducts,
        dropout: Dropout | None,
        *matrices: Tensor,
    ) -> Tensor:
        count = len(sizes)
        w, a, b = (matrices[start : start + count] for start in (0, count, 2 * count))
        seen = rows if dropout is None else rows * dropout.factors(rows)
        low = grouped.products(seen, [one.t() for one in a], sizes).mul_(scaling)
        out = grouped.products(rows, [one.t() for one in w], sizes)
        grouped.products(low, [one.t() for one in b], sizes, add_to=out)
        ctx.save_for_backward(rows, low, *matrices)
        ctx.sizes, ctx.scaling, ctx.grouped, ctx.dropout = sizes, scaling, grouped, dropout
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, *matrices = ctx.saved_tensors
        sizes, grouped, count = ctx.sizes, ctx.grouped, len(ctx.sizes)
        w, a, b = (matrices[start : start + count] for start in (0, count, 2 * count))
        factors = ctx.dropout and ctx.dropout.factors(rows)
        grad = grad.contiguous()
        low_grad = grouped.products(grad, b, sizes).mul_(ctx.scaling)
        own = None
        if ctx.needs_input_grad[0]:
            own = grouped.products(grad, w, sizes)
            if factors is None:
                grouped.products(low_grad, a, sizes, add_to=own)
            else:
                own.addcmul_(grouped.products(low_grad, a, sizes), factors)
        da = grouped.outer(low_grad, rows if factors is None else rows * factors, sizes)
        db = grouped.outer(grad, low, sizes)
        return own, None, None, None, None, *[None] * count, *da, *db


class GroupedLora:
    """An adapted linear layer of all experts; takes the place of `GroupedLinear`.

    Attributes:
        layers: the adapters, one per expert.
        base: what they adapt.
    """

    def __init__(self, layers: Sequence[ParallelLora], grouped: GroupedProducts) -> None:
        self.layers, self.grouped = list(layers), grouped
        self.base = GroupedLinear([layer.base_layer for layer in layers], grouped)

    @staticmethod
    def fits(layers: Sequence[nn.Module]) -> bool:
        """Whether adapters can be computed together: all of one rank and scaling, and none with lengths (DoRA)."""
        if not all(isinstance(layer, ParallelLora) and not layer.lora_magnitude_vector for layer in layers):
            return False
        return len({(layer.factors()[0].shape, layer.factors()[2]) for layer in layers}) == 1

    def __call__(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """As `models.experts.GroupedLayer` says."""
        first = self.layers[0]
        if first.disable_adapters:
            return self.base(rows, sizes)
        a, b, scalings = zip(*(layer.factors() for layer in self.layers), strict=True)
        dropout = first.draw_dropout()  # one mask for the rows of all experts
        if first.fuses:
            weights = [layer.weight for layer in self.base.layers]
            return _GroupedLora.apply(rows, sizes, scalings[0], self.grouped, dropout, *weights, *a, *b)
        seen = rows if dropout is None else rows * dropout.factors(rows)
        low = grouped_linear(seen.to(a[0].dtype), sizes, a, self.grouped)
        delta = grouped_linear(low, sizes, b, self.grouped) * scalings[0]
        return self.base(rows, sizes) + delta.to(rows.dtype)

    def biases(self) -> list[Tensor] | None:
        """As `models.experts.GroupedLayer` says; adapters have none."""
        return self.base.biases()


def group_adapters(chunk: nn.Module) -> None:
    """Let experts that are computed together compute their adapters together, where they are all adapted alike."""
    for experts in chunk.modules():
        if not isinstance(experts, GroupedExperts) or experts.together is None:
            continue
        layers = [experts.layers(part) for part in LAYERS]
        adapted = [any(isinstance(layer, ParallelLora) for layer in each) for each in layers]
        if all(not any_of or GroupedLora.fits(each) for each, any_of in zip(layers, adapted, strict=True)):
            kinds = (GroupedLora if any_of else GroupedLinear for any_of in adapted)
            first, second = (kind(each, experts.grouped) for kind, each in zip(kinds, layers, strict=True))
            experts.together = first, second
        else:
            experts.together = None
