"""LoRA on megatron-core's parallel linear layers: the readable reference form.

Shapes: s sequence, b batch, i input, o output, r rank; `/t` = divided by TP. Under sequence parallelism (SP) the
activations between parallel regions are [s/t, b, h].

    column: W [o/t, i]  A [r, i] replicated  B [o/t, r]            row: W [o, i/t]  A [r, i/t]  B [o, r] replicated

Experts are cut alike over their own processes (ETP), but the token dispatcher gathers their input and adds up their
output: here they compute on [n, i] whole tokens, give partial sums, and communicate nothing. Both replicated factors
then get partial gradients, which are summed over ETP after the backward pass (`models.expert_marks`).

peft's own Megatron layer does not work with the versions pinned here, and its gradients under SP are wrong: the
replicated factor sees a slice of the tokens, so its gradient must be summed over TP. The mark `sequence_parallel` on
that parameter makes megatron-core do so.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.checkpoint.tables import MAGNITUDE
from mindspeed_llm.lora import fused
from mindspeed_llm.lora.dora import Magnitude, row_norms, with_lengths
from mindspeed_llm.lora.dropout import Dropout
from mindspeed_llm.lora.overlap import CHUNK_BYTES
from mindspeed_llm.models.expert_marks import mark_expert_parameter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types of factors that are not simply the base's."""


class ParallelLora(nn.Module, LoraLayer):
    """What the column- and the row-parallel adapter share: parameters, marks, and the choice of the form.

    Attributes:
        use_fused: run the fused autograd function instead of the modular form, where it can (`fuses`).
        chunk_bytes: least bytes of a chunk in the fused form.
        leg: while this layer is part of a larger computation, what gives its output, or None.
        kind: "column", "row" or "replicated".
        adapted_rows: bool [o] or [o/t], the output rows that are adapted; None for all.
    """

    use_fused = False
    chunk_bytes = CHUNK_BYTES
    leg: Callable[[Tensor], Tensor] | None = None
    kind: str
    split_factor: int | None = None  # which of A (0) and B (1) is cut over the ranks
    adapted_rows: Tensor | None = None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.group = base_layer.tp_group
        self.of_expert = getattr(base_layer, "is_expert", False)
        self.sequence_parallel = self.sees_local_tokens(base_layer) and not self.of_expert
        self._active_adapter = adapter_name
        self.lora_A_start, self.lora_B_start = nn.ModuleDict(), nn.ModuleDict()
        self.update_layer(adapter_name, kwargs["r"], kwargs["lora_alpha"], config)

    @staticmethod
    def sees_local_tokens(base_layer: nn.Module) -> bool:
        """Whether ranks hold their own tokens on a side of the layer: sequence parallelism."""
        return base_layer.sequence_parallel

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        out_features, in_features = module.weight.shape
        return in_features, out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Create A and B as this rank holds them, uninitialised: `inject` fills them by their logical names."""
        weight = self.base_layer.weight
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.use_rslora[adapter_name] = self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        made = {"bias": False, "device": weight.device, "dtype": weight.dtype}
        self.lora_A[adapter_name] = nn.utils.skip_init(nn.Linear, self.in_features, r, **made)
        self.lora_B[adapter_name] = nn.utils.skip_init(nn.Linear, r, self.out_features, **made)
        self.mark(self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight)
        self.set_adapter(self.active_adapters)

    def mark(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """Tell megatron-core how the ranks share a pair of factors, and which of them hold the same."""
        if not self.of_expert:
            self.mark_parameters(a, b)
            return
        for number, factor in enumerate((a, b)):
            split = self.split_factor == number
            mark_expert_parameter(factor, self.group, (1 - number) if split else None)

    def adopt(self, settings: LoraSettings, module: str) -> None:
        """Take on what `settings` say beyond peft's part of this layer (`module`); new tensors hold no values."""
        name = self.active_adapters[0]
        weight, dtype = self.base_layer.weight, DTYPES.get(settings.dtype)
        self.scaling[name] = settings.scaling(module)
        if settings.init == "pissa":
            for factor, start in ((self.lora_A, self.lora_A_start), (self.lora_B, self.lora_B_start)):
                start[name] = copy.deepcopy(factor[name])
                start[name].requires_grad_(False)
            # copies have no marks; without them replicas of all experts would be made equal at the start
            self.mark(self.lora_A_start[name].weight, self.lora_B_start[name].weight)
        if settings.use_dora:
            magnitude = self.lora_magnitude_vector[name] = Magnitude(weight)
            if self.kind == "column":
                set_tensor_model_parallel_attributes(magnitude.weight, True, 0, 1)
            else:
                magnitude.weight.sequence_parallel = self.sequence_parallel
        for own in (self.lora_A, self.lora_B, self.lora_A_start, self.lora_B_start, self.lora_magnitude_vector):
            own.to(dtype or weight.dtype)

    def adapt_only(self, rows: Tensor) -> None:
        """Leave all output rows but `rows` (bool [o] or [o/t]) to the base: no gradients there, and B stays 0."""
        self.adapted_rows = rows.to(self.base_layer.weight.device)
        chosen = self.adapted_rows.unsqueeze(1)
        self.lora_B[self.active_adapters[0]].weight.register_hook(lambda grad: grad * chosen)

    @property
    def fuses(self) -> bool:
        """Whether the fused form can serve this adapter: no DoRA, and factors of the base's type."""
        same = self.lora_A[self.active_adapters[0]].weight.dtype == self.base_layer.weight.dtype
        return self.use_fused and same and not self.lora_magnitude_vector

    def mark_parameters(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """Tell megatron-core which factor is split over TP and which one is replicated."""
        raise NotImplementedError("a parallel adapter says how its factors are split")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(output, bias) as megatron-core's layers return them; bias is None unless its addition is left to others."""
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        factors, dropout = self.factors(), self.draw_dropout()
        if not self.fuses or self.case not in fused.CASES:
            out, bias = self.base_layer(x, *args, **kwargs)
            seen = x if dropout is None else x * dropout.factors(x)
            delta = self.delta(seen.to(factors[0].dtype), *factors)
            if not self.lora_magnitude_vector:
                return out + delta.to(out.dtype), bias
            seen_out = out if dropout is None else self.base_layer(seen, *args, **kwargs)[0]
            return with_lengths(out, seen_out, delta, self.added_bias, self.length_factors(*factors)), bias
        if self.leg is not None:
            out = self.leg(x)
        else:
            out = fused.apply(x, self.base_layer.weight, *factors, self.plan(self.case), dropout)
        bias = getattr(self.base_layer, "own_bias", self.base_layer.bias)
        if bias is None or self.base_layer.skip_bias_add:
            return out, bias
        return out + bias, None

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """(A, B, scaling) of the active adapter; of PiSSA with those it started from: [A; A_start], [B, -B_start]."""
        name = self.active_adapters[0]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if name in self.lora_A_start:
            a = torch.cat([a, self.lora_A_start[name].weight])
            b = torch.cat([b, -self.lora_B_start[name].weight], 1)
        return a, b, self.scaling[name]

    @property
    def added_bias(self) -> Tensor | None:
        """The bias that the base layer's output already contains."""
        return None if getattr(self.base_layer, "skip_bias_add", True) else self.base_layer.bias

    def row_norms(self, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """|W + s B A| of this rank's output rows, float32 [o] or [o/t]."""
        return row_norms(self.base_layer.weight, a, b, scaling, self.group if self.kind == "row" else None)

    def length_factors(self, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """DoRA's m / |W + s B A|, float32 [o] or [o/t]."""
        lengths = self.lora_magnitude_vector[self.active_adapters[0]].weight
        factors = lengths.float() / self.row_norms(a, b, scaling)
        return factors if self.adapted_rows is None else torch.where(self.adapted_rows, factors, 1.0)

    def plan(self, case: str) -> fused.Plan:
        """How the fused form runs `case` on this layer's group."""
        return fused.Plan(case, self.group, self.chunk_bytes)

    def draw_dropout(self) -> Dropout | None:
        """Dropout of the next call; None in evaluation and where the adapter has none."""
        dropout = self.lora_dropout[self.active_adapters[0]]
        if not self.training or isinstance(dropout, nn.Identity):
            return None
        return Dropout.draw(dropout.p, self.share)

    @property
    def share(self) -> int:
        """Number of this rank's share of the input; equal on ranks that hold the same input."""
        split = self.kind == "row" or self.sequence_parallel
        own = self.group.rank() if split else 0
        if not self.of_expert:
            return own
        return parallel_state.get_expert_model_parallel_rank() * self.group.size() + own

    def delta(self, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """The adapter's share of the output, in the output's layout."""
        raise NotImplementedError("a parallel adapter computes its own share")

    @property
    def case(self) -> str:
        """Which communication case of `fused` this layer is."""
        if self.of_expert:
            return "expert"
        if self.group.size() == 1:
            return "single"
        return f"{self.kind}_sp" if self.sequence_parallel else self.kind


class ColumnParallelLora(ParallelLora):
    """Adapter of a layer whose output is split over TP."""

    kind = "column"
    split_factor = 1

    def mark_parameters(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """A is replicated and sees local tokens only under SP; B is split."""
        a.sequence_parallel = self.sequence_parallel
        set_tensor_model_parallel_attributes(b, True, 0, 1)

    def delta(self, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """[s, b, i] or [s/t, b, i] -> [s, b, o/t]."""
        ax = nn.functional.linear(x, a)
        if self.of_expert:
            return nn.functional.linear(ax, b) * scaling
        if self.sequence_parallel:
            ax = gather_from_sequence_parallel_region(ax, group=self.group)
        else:
            ax = copy_to_tensor_model_parallel_region(ax, group=self.group)
        return nn.functional.linear(ax, b) * scaling


class RowParallelLora(ParallelLora):
    """Adapter of a layer whose input is split over TP."""

    kind = "row"
    split_factor = 0

    def mark_parameters(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """A is split; B is replicated and sees local tokens only under SP."""
        set_tensor_model_parallel_attributes(a, True, 1, 1)
        b.sequence_parallel = self.sequence_parallel

    def delta(self, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """[s, b, i/t] -> [s, b, o] or [s/t, b, o]."""
        ax = nn.functional.linear(x, a)
        if self.of_expert:
            return nn.functional.linear(ax, b) * scaling
        if self.sequence_parallel:
            ax = reduce_scatter_to_sequence_parallel_region(ax, group=self.group)
        else:
            ax = reduce_from_tensor_model_parallel_region(ax, group=self.group)
        return nn.functional.linear(ax, b) * scaling


class ReplicatedLora(ParallelLora):
    """Adapter of a layer that every rank holds whole (latent attention's down projections)."""

    kind = "replicated"

    def mark_parameters(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """Both see local tokens only under SP."""
        a.sequence_parallel = b.sequence_parallel = self.sequence_parallel

    def delta(self, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """[s/t, b, i] under SP, else [s, b, i] -> the same with o."""
        return nn.functional.linear(nn.functional.linear(x, a), b) * scaling

    @property
    def case(self) -> str:
        """Nothing is communicated, with sequence parallelism or without."""
        return "single"


def lora_layers(module: nn.Module) -> list[ParallelLora]:
    """All adapters below `module`."""
    return [m for m in module.modules() if isinstance(m, ParallelLora)]


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """The model without its adapters, in evaluation mode, for as long as the context lasts.

    peft's own switch also changes which parameters ask for gradients, which optimizer and communication rely on.
    """
    layers, training = lora_layers(module), module.training
    module.eval()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        module.train(training)


def is_lora_parameter(name: str) -> bool:
    """Whether a parameter name belongs to an adapter and is trained; what PiSSA started from is not."""
    return any(f".{kind}." in name for kind in ("lora_A", "lora_B", MAGNITUDE))


def uniform_init(shape: tuple[int, int], seed: int) -> Tensor:
    """A's initial values, fp32 [r, i]: uniform in +-1/sqrt(i), peft's kaiming_uniform(sqrt(5)) in closed form."""
    bound = shape[1] ** -0.5
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
