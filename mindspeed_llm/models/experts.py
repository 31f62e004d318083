"""A layer's experts, computed together: tokens lie sorted by expert, and every step is one for all of them.

megatron-core's `SequentialMLP` runs a whole MLP per expert, a handful of tokens each: with many small experts most of
the time goes into starting operations. Here both layers' products are grouped (`device.grouped`), and activation,
routing weights and sums are computed once for all tokens. Parameters and their names stay megatron-core's.

Shapes: n token-expert pairs sorted by expert, h hidden, f an expert's width, i and o of a linear layer;
`/t` = divided by expert tensor parallelism.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor, nn

from mindspeed_llm.device.grouped import GroupedProducts

LAYERS = ("linear_fc1", "linear_fc2")


class GroupedLayer(Protocol):
    """One linear layer of all experts."""

    def __call__(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """[n, i] sorted by expert, of which each has so many -> [n, o], without biases."""

    def biases(self) -> list[Tensor] | None:
        """Each expert's bias [o], or None without biases."""


class _Products(torch.autograd.Function):
    """Y_e = X_e W_e^T of every expert e; gradients of what asks for them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sequence[int], grouped: GroupedProducts, *weights: Tensor) -> Tensor:
        ctx.sizes, ctx.grouped = sizes, grouped
        ctx.trained = any(ctx.needs_input_grad[3:])
        ctx.save_for_backward(*weights, *([rows] if ctx.trained else []))
        return grouped.products(rows, [weight.t() for weight in weights], sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad, count = grad.contiguous(), len(ctx.sizes)
        weights, rows = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        wanted = ctx.needs_input_grad
        own = ctx.grouped.products(grad, weights, ctx.sizes) if wanted[0] else None
        if not ctx.trained:
            return own, None, None, *[None] * count
        found = ctx.grouped.outer(grad, rows[0], ctx.sizes)
        return own, None, None, *(one if asked else None for one, asked in zip(found, wanted[3:], strict=True))


def grouped_linear(rows: Tensor, sizes: Sequence[int], weights: Sequence[Tensor], grouped: GroupedProducts) -> Tensor:
    """[n, i] and a weight [o, i] for every expert -> [n, o]."""
    return _Products.apply(rows, sizes, grouped, *weights)


class GroupedLinear:
    """A linear layer of all experts without adapters.

    Attributes:
        layers: megatron-core's, one per expert.
    """

    def __init__(self, layers: Sequence[nn.Module], grouped: GroupedProducts) -> None:
        self.layers, self.grouped = list(layers), grouped

    def __call__(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """As `GroupedLayer` says."""
        return grouped_linear(rows, sizes, [layer.weight for layer in self.layers], self.grouped)

    def biases(self) -> list[Tensor] | None:
        """As `GroupedLayer` says; of partial sums, this rank's part."""
        if self.layers[0].bias is None:
            return None
        return [getattr(layer, "own_bias", layer.bias) for layer in self.layers]


class GroupedExperts(SequentialMLP):
    """megatron-core's experts, computed together unless `together` is None.

    Attributes:
        together: both linear layers of all experts; None to run one expert after another.
        grouped: the device's products.
    """

    together: tuple[GroupedLayer, GroupedLayer] | None

    def __init__(self, *args: Any, grouped: GroupedProducts, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grouped = grouped
        for name in LAYERS:
            grouped.lay_out([layer.weight for layer in self.layers(name)])
        first, second = (GroupedLinear(self.layers(name), grouped) for name in LAYERS)
        self.together = first, second

    def layers(self, name: str) -> list[nn.Module]:
        """One of the two linear layers ("linear_fc1", "linear_fc2"), expert by expert."""
        return [getattr(expert, name) for expert in self.local_experts]

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """([n, h] sorted by expert, pairs of each expert [e], routing weights [n]) -> ([n, h], no bias left to add)."""
        if self.together is None:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        rows, probs, sizes = permuted_local_hidden_states, permuted_probs.unsqueeze(-1), tokens_per_expert.tolist()
        multiple = self.grouped.row_multiple(rows.dtype)
        if multiple == 1:
            return self.compute(rows, probs, sizes), None
        places, sizes = filled_up(sizes, multiple, rows.device)
        rows, probs = (one.new_zeros(sum(sizes), one.size(1)).index_copy(0, places, one) for one in (rows, probs))
        return self.compute(rows, probs, sizes).index_select(0, places), None

    def compute(self, rows: Tensor, probs: Tensor, sizes: Sequence[int]) -> Tensor:
        """All experts' MLPs: rows [n, h] and routing weights [n, 1] -> [n, h]."""
        first, second = self.together
        hidden = first(rows, sizes)
        biases = first.biases()
        if biases is not None:
            hidden = hidden + each_rows(biases, sizes)
        out = second(self.activate(hidden, probs), sizes)
        biases = second.biases()
        if biases is not None:
            out = out + (each_rows(biases, sizes) * probs).to(out.dtype)
        return out

    def activate(self, hidden: Tensor, probs: Tensor) -> Tensor:
        """Gate and up [n, 2 f/t], routing weights [n, 1] -> the activated product times the weights [n, f/t]."""
        gate, up = hidden.chunk(2, -1)
        limit, offset = self.config.activation_func_clamp_value, self.config.glu_linear_offset
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        found = self.config.activation_func(gate) * (up + offset if offset else up)
        return (found * probs).to(found.dtype)


def each_rows(values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """A vector [o] for every expert, repeated for each of its rows: [n, o]."""
    counts = torch.tensor(sizes, device=values[0].device)
    return torch.stack(list(values)).repeat_interleave(counts, 0, output_size=sum(sizes))


def filled_up(sizes: Sequence[int], multiple: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """Groups with room for a multiple of rows each: (where the rows go [n], sizes with that room)."""
    roomy = [-(-size // multiple) * multiple for size in sizes]
    shifts = [0, *accumulate(room - size for room, size in zip(roomy, sizes, strict=True))][:-1]
    shift = torch.tensor(shifts).repeat_interleave(torch.tensor(sizes))
    return (torch.arange(sum(sizes)) + shift).to(device), roomy
