"""Causal attention on a CPU: in blocks that stay in its cache where it has wide vectors or matrix tiles; elsewhere
torch's flash kernel forward, and a faster way back where rows are short.

Shapes: b batch, n query heads, g key-value heads, t tokens, d head dimension, i queries of a block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mindspeed_llm.device import kernels, native
from mindspeed_llm.device.segments import Segments

LONGEST = 1024
"""Tokens up to which products of whole matrices are faster than torch's kernel on the way back. Measured, 1,024 tokens
of 16 heads of 64, two cores: rows of 512 tokens 13 ms against 20 in bfloat16 and 17 against 25 in float32, of 1,024 22
against 25 and 31 against 32, of 2,048 95 against 79."""
SHORT = 256
"""Tokens up to which torch's float32 kernel is the fastest, for both types: 7 to 12 ms in bfloat16, casts included,
where torch's bfloat16 kernel costs as much per token at 32 tokens as at 768."""
FILLED = 64
"""Tokens to whose multiple a row is filled up in bfloat16: oneDNN compiles a product for every new shape. Rows of 100
to 600 tokens, each of another length: 30 ms as they are, 17 filled up, 33 by torch's kernel."""
SCORES = 1 << 21
"""Scores that exist at a time, in float32."""
QUERIES = 64, 256
"""Least and largest number of queries of a block."""
BLOCK_WIDTH = 32
"""Head dimensions that `native_attention.c` takes are multiples of it."""


class _BlockAttention(torch.autograd.Function):
    """Causal attention of each segment by `native_attention.c`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
        query, key, value = (_in_rows(one) for one in (query, key, value))
        b, n, t, d = query.shape
        out = _like(query)
        log_sums = torch.empty(b, n, t, dtype=torch.float32)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        sizes = len(lengths), max(lengths), b, n, key.size(1), t, d
        given = query, key, value, out
        native.run("attention", query.dtype, query.numel(), *given, log_sums, bounds, _strides(*given), *sizes, scale)
        ctx.save_for_backward(*given, log_sums, bounds)
        ctx.sizes, ctx.scale = sizes, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sums, bounds = ctx.saved_tensors
        segments, longest, b, n, g, t, d = ctx.sizes
        if spread := g < n and segments * b * g < torch.get_num_threads():  # a thread works on a key head or more
            key, value = (one.repeat_interleave(n // g, 1) for one in (key, value))
        given = _in_rows(grad), query, key, value, out
        found = [_like(one) for one in (query, key, value)]
        rest = bounds, _strides(*given, *found), segments, longest, b, n, key.size(1), t, d, ctx.scale
        native.run("attention_backward", query.dtype, query.numel(), *given, log_sums, *found, *rest)
        if spread:
            found[1:] = (one.unflatten(1, (g, n // g)).sum(2, dtype=torch.float32).to(one.dtype) for one in found[1:])
        return *found, None, None


def _in_rows(x: Tensor) -> Tensor:
    """Components side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """An empty tensor in memory order [t, b, n, d], as projections make and take it: no copy is made of it."""
    b, n, t, d = x.shape
    return torch.empty(t, b, n, d, dtype=x.dtype).permute(1, 2, 0, 3)


def _strides(*heads: Tensor) -> Tensor:
    """Of (row, head, token) of each [b, n, t, d]."""
    return torch.tensor([one.stride()[:3] for one in heads])


class _Attention(torch.autograd.Function):
    """Causal attention of each segment, and of rows in a batch."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        parts = zip(*(one.split(lengths, 2) for one in (query, key, value)), strict=True)
        outs, sums = zip(*(kernel(*part, 0.0, True, scale=scale) for part in parts), strict=True)
        out = _joined(outs)  # kept as it is handed on, so that there is one of it
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *sums = ctx.saved_tensors
        parts = zip(*(one.split(ctx.lengths, 2) for one in (grad, query, key, value, out)), sums, strict=True)
        found = [gradients(*part, ctx.scale) for part in parts]
        grads = (_joined(each).to(query.dtype) for each in zip(*found, strict=True))
        return *grads, None, None


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Segments one behind the other, in memory order [b, t, n, d]."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([one.transpose(1, 2) for one in parts], 1).transpose(1, 2)


def gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, by the way that is fastest for this length and type.

    Args:
        grad, query, out: [b, n, t, d]; key, value: [b, g, t, d].
        log_sums: of each query's exponentials, float32 [b, n, t].
    """
    b, n, t, _ = query.shape
    given = grad, query, key, value, out
    if SHORT < t <= LONGEST and native.serves(*given):
        if lacking := -t % FILLED if query.dtype == torch.bfloat16 else 0:  # no token sees what is behind it
            given, log_sums = tuple(pad(one, (0, 0, 0, lacking)) for one in given), pad(log_sums, (0, lacking))
        rows = max(1, SCORES // (n * t * QUERIES[0]))
        parts = zip(*(one.split(rows) for one in (*given, log_sums)), strict=True)
        found = [by_products(*part, scale) for part in parts]
        whole = (torch.cat(each) if len(found) > 1 else each[0] for each in zip(*found, strict=True))
        return tuple(one[:, :, :t] for one in whole)
    if query.dtype == torch.bfloat16 and t <= SHORT:
        given = tuple(one.float() for one in given)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(*given, log_sums, 0.0, True, scale=scale)


def by_products(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `gradients` as batched products over blocks of queries and the keys these see.

    P = exp(s Q K^T - log_sums), dV = P^T dO, dS = s P (dO V^T - rowsum(dO O)), dQ = dS K, dK = dS^T Q.

    P and dS are laid out by keys. Scores and dO V^T are float32: rounded to bfloat16 they would cost 3 ms of 13 less,
    and twice the error. Sums over blocks are float32.
    """
    b, n, t, d = query.shape
    g, m, dtype = key.size(1), n // key.size(1), query.dtype
    block = min(max(SCORES // (b * n * t) // FILLED * FILLED, QUERIES[0]), QUERIES[1])
    keys, values = (one.reshape(b * g, t, d) for one in (key, value))
    wide_keys, wide_values = keys.float(), values.float()
    dots = _row_dots(grad, out)
    dq = torch.empty(b, t, n, d, dtype=dtype).transpose(1, 2)
    dk, dv = (torch.zeros(b * g, t, d, dtype=torch.float32) for _ in range(2))
    for first in range(0, t, block):
        rows, seen = slice(first, first + block), min(first + block, t)
        q, do = (one[:, :, rows].reshape(b * g, -1, d) for one in (query, grad))  # m heads of a group, one by one
        p = torch.bmm(wide_keys[:, :seen], q.float().transpose(1, 2))
        ds = torch.bmm(wide_values[:, :seen], do.float().transpose(1, 2))
        made = (p, ds) if dtype == torch.float32 else tuple(torch.empty_like(one, dtype=dtype) for one in (p, ds))
        sums = (one[:, :, rows].contiguous() for one in (log_sums, dots))
        sizes = b * g, seen, m, seen - first, first
        native.run("softmax_backward", dtype, p.numel(), p, ds, *sums, *made, *sizes, scale)
        p, ds = made
        for total, left, right in ((dv, p, do), (dk, ds, q)):
            if dtype == torch.float32:
                total[:, :seen].baddbmm_(left, right)
            else:
                total[:, :seen] += torch.bmm(left, right)
        dq[:, :, rows] = torch.bmm(ds.transpose(1, 2), keys[:, :seen]).view(b, n, -1, d)
    return dq, dk.to(dtype).view(b, g, t, d), dv.to(dtype).view(b, g, t, d)


def _row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Sums over d of the products of two [b, n, t, d], float32 [b, n, t]."""
    left, right = _in_rows(left), _in_rows(right)
    b, n, t, d = left.shape
    found = torch.empty(b, n, t, dtype=torch.float32)
    strides = *left.stride()[:3], *right.stride()[:3]
    native.run("row_dots", left.dtype, left.numel(), left, right, found, b, n, t, d, *strides)
    return found


def causal(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments | None, scale: float, window: int | None
) -> Tensor | None:
    """Rows, or their segments, of equal numbers of queries and keys; see `kernels.SegmentKernel`."""
    if window is not None or query.size(2) != key.size(2) or not query.numel():
        return None
    lengths = (query.size(2),) if segments is None else tuple(one for one in segments.lengths if one)
    if query.size(-1) % BLOCK_WIDTH == 0 and native.blocked(query, key, value):  # also where no gradient is wanted
        return _BlockAttention.apply(query, key, value, lengths, scale)
    backward = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    gains = query.dtype == torch.bfloat16 and segments is not None  # short segments, even without `native`
    if not backward or not (gains or native.serves(query)):
        return None
    return _Attention.apply(query, key, value, lengths, scale)


attention = kernels.attention_with(causal, whole=True)
