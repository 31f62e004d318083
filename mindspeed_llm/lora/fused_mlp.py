"""CCLoRA over a whole gated MLP: both layers, their adapters and the activation in one autograd function.

    H = X W1^T + low1 B1^T      U = silu(H[:, :f]) * H[:, f:]      Y = U W2^T + low2 B2^T       low as in `fused`

Rows never leave a rank between the two layers, so a chunk of rows goes through all of it: under sequence parallelism
gathering the next chunk and summing the last one are both hidden by the products of both layers. Kept for the backward
pass are X, H and the narrow tensors; U is made again from H.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.nn.functional import silu

from mindspeed_llm.device.rowwise import swiglu, swiglu_backward
from mindspeed_llm.lora.dropout import Dropout
from mindspeed_llm.lora.fused import CASES, Pass, Plan, Product
from mindspeed_llm.lora.layers import ColumnParallelLora, RowParallelLora
from mindspeed_llm.lora.overlap import Meanwhile, Way, Work, joined, outer, stream


@dataclass(frozen=True)
class MlpPlan:
    """A `Plan` and what both adapters add to it."""

    plan: Plan
    scalings: tuple[float, float]
    dropouts: tuple[Dropout | None, Dropout | None]


class _LoraMlp(torch.autograd.Function):
    """The module's equations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, a1: Tensor, b1: Tensor, w2: Tensor, a2: Tensor, b2: Tensor, own: MlpPlan
    ) -> Tensor:
        flat, plan, way = x.reshape(-1, x.size(-1)), own.plan, CASES[own.plan.case].forward
        total = flat.size(0) * (plan.group.size() if way.gathers else 1)
        hidden = flat.new_empty(total, w1.size(0))
        before = [own.dropouts[0] and own.dropouts[0].factors(flat)]
        before.append(own.dropouts[1] and own.dropouts[1].factors(hidden[:, : w2.size(1)]))
        first = Product(w1.t(), a1.t(), b1.t(), own.scalings[0], before[0])
        second = Product(w2.t(), a2.t(), b2.t(), own.scalings[1], before[1])
        into = Pass(flat, first, Way(way.gathers, False, way.split), plan.group)
        out_of = Pass(flat, second, Way(False, way.sums, way.split), plan.group, total)

        def each(rows: slice, x_rows: Tensor, out: Tensor) -> None:
            into.run(rows, x_rows, hidden[rows])
            out_of.run(rows, swiglu(hidden[rows]), out)

        y, low2 = out_of.finish(stream(flat, out_of.columns, each, way, plan.group, plan.chunk_bytes))
        ctx.save_for_backward(flat, hidden, into.lows, low2, w1, a1, b1, w2, a2, b2)
        ctx.own, ctx.shape = own, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, low1, low2, w1, a1, b1, w2, a2, b2 = ctx.saved_tensors
        plan, way, wanted = ctx.own.plan, CASES[ctx.own.plan.case].backward, ctx.needs_input_grad[0]
        dropouts, scalings = ctx.own.dropouts, ctx.own.scalings
        dy = grad.reshape(-1, grad.size(-1))
        after = [dropouts[0] and dropouts[0].factors(x), dropouts[1] and dropouts[1].factors(hidden[:, : w2.size(1)])]
        second = Product(w2, b2, a2, scalings[1], after=after[1])
        first = Product(w1 if wanted else None, b1, a1, scalings[0], after=after[0])
        into = Pass(dy, second, Way(way.gathers, False, way.split), plan.group)
        out_of = Pass(dy, first, Way(False, way.sums, way.split), plan.group, hidden.size(0))
        parts_a2, parts_b1, db2 = [], [], []

        def each(rows: slice, dy_rows: Tensor, out: Tensor) -> Work:
            grad_act = dy_rows.new_empty(dy_rows.size(0), w2.size(1))
            into.run(rows, dy_rows, grad_act)
            grad_hidden, act = swiglu_backward(grad_act, hidden[rows])
            out_of.run(rows, grad_hidden, out)

            def adapters() -> None:
                seen = act if after[1] is None else act.mul_(after[1][rows])
                parts_a2.append(into.lows[rows].t() @ seen)
                parts_b1.append(outer(grad_hidden, low1[rows]))

            return adapters

        def grad_b2() -> None:
            db2.append(outer(dy, low2))

        meanwhile = Meanwhile(early=grad_b2)
        dx, low = out_of.finish(stream(dy, out_of.columns, each, way, plan.group, plan.chunk_bytes, meanwhile))
        da1 = low.t() @ (x if after[0] is None else x * after[0])
        dx = dx.view(ctx.shape) if wanted else None
        return dx, None, da1, joined(parts_b1), None, joined(parts_a2), *db2, None


class AdaptedMlp:
    """A gated MLP whose two layers have adapters, computed in one step; takes the place of its forward pass.

    Attributes:
        fc1, fc2: the adapted layers.
    """

    def __init__(self, fc1: ColumnParallelLora, fc2: RowParallelLora) -> None:
        self.fc1, self.fc2 = fc1, fc2

    @staticmethod
    def fits(mlp: MLP) -> bool:
        """Whether an MLP is one this can compute: SwiGLU without biases or limits, both layers adapted and fused."""
        fc1, fc2, config = mlp.linear_fc1, mlp.linear_fc2, mlp.config
        adapted = isinstance(fc1, ColumnParallelLora) and isinstance(fc2, RowParallelLora)
        if not adapted or not (fc1.fuses and fc2.fuses) or fc1.of_expert:
            return False
        plain = config.activation_func_clamp_value is None and not config.glu_linear_offset
        swish = config.gated_linear_unit and config.activation_func is silu
        return plain and swish and fc1.base_layer.bias is None and fc2.base_layer.bias is None

    @property
    def case(self) -> str:
        """Which communication case of `fused` this is."""
        if self.fc1.group.size() == 1:
            return "mlp_single"
        return "mlp_sp" if self.fc1.sequence_parallel else "mlp"

    @property
    def active(self) -> bool:
        """Whether it is to be used: its case is in the table, and the adapters are on."""
        return self.case in CASES and not (self.fc1.disable_adapters or self.fc2.disable_adapters)

    def __call__(self, x: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h]; [s/t, b, h] -> the same under sequence parallelism."""
        (a1, b1, scaling1), (a2, b2, scaling2) = self.fc1.factors(), self.fc2.factors()
        dropouts = self.fc1.draw_dropout(), self.fc2.draw_dropout()
        own = MlpPlan(self.fc1.plan(self.case), (scaling1, scaling2), dropouts)
        out = _LoraMlp.apply(x, self.fc1.base_layer.weight, a1, b1, self.fc2.base_layer.weight, a2, b2, own)
        return out.view(-1, *x.shape[1:-1], out.size(-1))
