"""Functions of single rows, for any device: torch's operations, or on a CPU `native`'s kernels.

Shapes: n rows, f width of an activation; s positions, b batch, h heads, d head dimension, r rotated components; m
positions with a label, v words of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from mindspeed_llm.device import native

COLUMNS = 2048  # of a float32 temporary


def swiglu(hidden: Tensor) -> Tensor:
    """[n, 2 f], gate and up, contiguous -> silu(gate) up [n, f]; no gradient goes through."""
    if not native.serves(hidden):
        gate, up = hidden.chunk(2, dim=-1)
        return silu(gate).mul_(up)
    n, f = hidden.size(0), hidden.size(1) // 2
    out = hidden.new_empty(n, f)
    native.run("swiglu", hidden.dtype, n * f, hidden, out, n, f)
    return out


def swiglu_backward(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [n, f] of the activation -> (gradient [n, 2 f] of hidden, the activation [n, f] itself)."""
    out = torch.empty_like(hidden)
    if native.serves(grad, hidden):
        grad, act = grad.contiguous(), torch.empty_like(grad, memory_format=torch.contiguous_format)
        native.run("swiglu_backward", grad.dtype, grad.numel(), grad, hidden, out, act, *grad.shape)
        return out, act
    gate, up = hidden.chunk(2, dim=-1)
    opened = silu(gate)
    wide = gate.size(-1)
    out[:, :wide] = torch.ops.aten.silu_backward(grad * up, gate)
    torch.mul(grad, opened, out=out[:, wide:])
    return out, opened.mul_(up)


def row_peaks(logits: Tensor) -> Tensor:
    """The largest of each row of [m, v], float32 [m]."""
    if not native.serves(logits) or not logits.size(1):
        return logits.amax(-1).float() if logits.size(1) else torch.full(logits.shape[:1], -torch.inf).to(logits.device)
    found = torch.empty(logits.size(0), dtype=torch.float32)
    native.run("row_peaks", logits.dtype, logits.numel(), logits, found, *logits.shape, logits.stride(0))
    return found


def exponentials_(logits: Tensor, peaks: Tensor, cap: float | None = None) -> Tensor:
    """Put exp(logits - peaks) in the place of logits [m, v]; -> the sums of its rows, float32 [m].

    Args:
        peaks: float32 [m].
        cap: where logits are c tanh(z / c), what is put there is multiplied by the derivative, 1 - (logit / c)^2.
    """
    sums = torch.zeros_like(peaks)
    if cap is None and native.serves(logits):
        sizes = *logits.shape, logits.stride(0)
        native.run("row_exponentials", logits.dtype, logits.numel(), logits, peaks.contiguous(), sums, *sizes)
        return sums
    for part in logits.split(COLUMNS, 1):
        wide = part.float()
        found = (wide - peaks.unsqueeze(1)).exp_()
        sums += found.sum(-1)
        part.copy_(found if cap is None else found.mul_(1 - (wide / cap).square_()))
    return sums


class _Rotation(torch.autograd.Function):
    """Heads turned by their position; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _turned(x, table, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _turned(grad, ctx.saved_tensors[0], -1.0), None


def _turned(x: Tensor, table: Tensor, sign: float) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    strides = (*x.stride()[:3], table.stride(0))
    native.run("rope", x.dtype, x.numel(), x, table, out, *x.shape, table.size(-1), *strides, sign)
    return out


def rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """Turn the first r components of each head by its position.

    Args:
        x: [s, b, h, d].
        table: [s, 2, r], cosine and sine, float32.
        interleaved: component 2i belongs with 2i + 1, not i with i + r/2.
    """
    plain = table.dtype == torch.float32 and table.stride()[1:] == (table.size(-1), 1) and table.size(0) == x.size(0)
    if not interleaved and plain and native.serves(x):
        return _Rotation.apply(x, table)
    cosine, sine = table.to(x.dtype).unsqueeze(1).unsqueeze(1).unbind(3)  # [s, 1, 1, r]
    size = table.size(-1)
    turned, kept = (x, None) if x.size(-1) == size else (x[..., :size], x[..., size:])
    if interleaved:
        other = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        other = torch.cat([-second, first], -1)
    turned = turned * cosine + other * sine
    return turned if kept is None else torch.cat([turned, kept], -1)
