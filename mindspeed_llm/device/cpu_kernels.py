"""What plain torch computes slowly on a CPU, in fewer passes over memory: RMSNorm.

Shapes: m rows of a norm (tokens, or tokens x heads), h its width.
"""

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.device import grouped, kernels, native

BLOCK = 1 << 16
"""Elements of one float32 temporary of a norm: 256 KiB, so that its few temporaries stay in a core's cache."""
FILLED = 16
"""Rows to whose multiple a group of a 16-bit product is filled up."""
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # glibc's M_... constants
KEPT = 1 << 26
"""Bytes the heap grows by at a time."""


def keep_freed_memory() -> None:
    """Let glibc reuse what is freed instead of giving it back to the kernel and asking for zeroed pages again.

    A step allocates and frees the same activations over and over: 35,000 page faults per step of the benchmark's model
    without this, 1 with it. Nothing happens where the C library has no such settings.
    """
    settle = getattr(ctypes.CDLL(None), "mallopt", None)
    if settle is None:
        return
    for name, value in ((MMAP_THRESHOLD, 2**31 - 1), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, KEPT)):
        settle(name, value)


class GroupedProducts(grouped.GroupedProducts):
    """`grouped.GroupedProducts` for a library that compiles 16-bit products anew for every shape it has not kept.

    Experts get other numbers of rows in every step, and compiling (about 0.3 ms) takes longer than a small product.
    """

    def row_multiple(self, dtype: torch.dtype) -> int:
        """Few shapes for 16-bit types; see `grouped.GroupedProducts.row_multiple`."""
        return 1 if dtype in (torch.float32, torch.float64) else FILLED


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK // width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class _Norm(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + eps)^-1/2, computed in float32 and rounded once.

    dx = r (g - x r mean(g x r)) with g = dy w, and dw = sum(dy x r). Kept for the backward pass: x, w and r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.size(-1))
        out = torch.empty_like(flat, memory_format=torch.contiguous_format)
        if native.serves(flat, weight) and weight.is_contiguous():
            flat, inverse = flat.contiguous(), torch.empty(flat.size(0), 1, dtype=torch.float32)
            native.run("rms_norm", x.dtype, x.numel(), flat, weight, out, inverse, *flat.shape, eps)
            ctx.save_for_backward(flat, weight, inverse)
            return out.view(x.shape)
        wide = weight.float()
        length = torch.linalg.vector_norm(flat, dim=-1, keepdim=True, dtype=torch.float32)
        # one value per row, in float64: rounded to float32, a root and its square double the gradients' rounding
        inverse = length.double().square_().div_(flat.size(1)).add_(eps).rsqrt_().float()
        for rows in _blocks(*flat.shape):
            out[rows] = torch.mul(flat[rows].float(), inverse[rows]).mul_(wide)
        ctx.save_for_backward(flat, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        flat = grad.reshape(x.shape)
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        if wants_x and not wants_weight and native.serves(flat, x, weight) and weight.is_contiguous():
            dx = torch.empty_like(x)
            native.run("rms_norm_backward", x.dtype, x.numel(), flat.contiguous(), x, weight, inverse, dx, *x.shape)
            return dx.view(grad.shape), None, None
        wide = weight.float()
        dx = torch.empty_like(x) if wants_x else None
        dw = torch.zeros_like(wide) if wants_weight else None
        for rows in _blocks(*x.shape):
            unit = torch.mul(x[rows].float(), inverse[rows])
            if dw is not None:
                dw += (flat[rows].float() * unit).sum(0)
            if dx is not None:
                g = torch.mul(flat[rows].float(), wide)
                mean = torch.mul(unit, g).mean(-1, keepdim=True)
                dx[rows] = g.addcmul_(unit, mean, value=-1).mul_(inverse[rows])
        return None if dx is None else dx.view(grad.shape), None if dw is None else dw.to(weight.dtype), None


class RMSNorm(kernels.RMSNorm):
    """`kernels.RMSNorm` in few passes: half the time of torch's, which runs operation by operation on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        if self.zero_centered or x.dtype == torch.float64:
            return super().forward(x)
        return _Norm.apply(x, self.weight, self.eps)
