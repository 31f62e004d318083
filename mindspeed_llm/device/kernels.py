"""Attention and normalisation in plain torch, for every device.

Shapes: b batch, n query heads, g key-value heads, q query positions, k key positions, d head dimension.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mindspeed_llm.device.segments import Segments, each_segment

BLOCK = 1024
"""Queries of one block, where a mask is needed: it bounds the mask's and the scores' memory."""
SINK_WIDTH = 8
"""Components added to a head for a sink: one is used, the others keep it a multiple of eight for the kernels."""


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Scaled dot-product attention by torch's own kernels where they can, in blocks of queries otherwise.

    Args:
        query: [b, n, q, d]; key, value: [b, g, k, d] with n a multiple of g.
        causal: query i sees keys 0..i + k - q, so a query block may continue a cached prefix. The arguments below
            imply it.
        scale: factor on the scores, usually 1/sqrt(d).
        window: a query sees this many keys, its own included.
        softcap: c; scores become c * tanh(scores / c) before the softmax.
        sinks: [n]; each head's logit that joins the softmax's denominator. Not together with `softcap`.
        segments: of the one row (b = 1, q = k), which do not see each other.

    Returns:
        [b, n, q, d], in memory order [b, q, n, d] where the kernel chooses so.
    """
    if segments is not None:
        features = {"causal": causal, "scale": scale, "dropout": dropout, "window": window}
        return each_segment(sdpa, query, key, value, segments, softcap=softcap, sinks=sinks, **features)
    queries, keys = query.size(2), key.size(2)
    window = None if window is None or window >= keys else window
    if window is None and softcap is None and sinks is None:
        return plain_sdpa(query, key, value, causal, scale, dropout)
    if softcap is not None and sinks is not None:
        raise NotImplementedError("attention with capped scores and sinks; no model has both")
    parts = []
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        last = stop + keys - queries
        first = 0 if window is None else max(0, start + keys - queries - window + 1)
        mask = visible_keys(stop - start, last - first, window, query.device)
        block = query[:, :, start:stop], key[:, :, first:last], value[:, :, first:last], mask
        if softcap is not None:
            parts.append(capped_attention(*block, scale, softcap, dropout))
        elif sinks is not None:
            parts.append(sink_attention(*block, scale, sinks, dropout))
        else:
            parts.append(masked_sdpa(*block, scale, dropout))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


SegmentKernel = Callable[[Tensor, Tensor, Tensor, Segments | None, float, int | None], Tensor | None]
"""(query, key, value, segments, scale, window) -> causal attention of each segment, or None for what it does not do."""


def attention_with(kernel: SegmentKernel, whole: bool = False) -> Callable[..., Tensor]:
    """`sdpa`, with a device's own kernel for causal segments; neither cap, sinks nor dropout are asked of it.

    Args:
        whole: the kernel is asked for whole rows too, with no segments.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor, **features: Any) -> Tensor:
        segments, plain = features.get("segments"), features["causal"] and not features.get("dropout")
        plain = plain and features.get("softcap") is None and features.get("sinks") is None
        if (whole or segments is not None) and plain and query.size(-1) == value.size(-1):
            found = kernel(query, key, value, segments, features["scale"], features.get("window"))
            if found is not None:
                return found
        return sdpa(query, key, value, **features)

    return attention


def plain_sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, dropout: float) -> Tensor:
    """Attention to all keys, or to all up to the query's own."""
    if causal and query.size(2) != key.size(2):  # continues a cached prefix
        mask = visible_keys(query.size(2), key.size(2), None, query.device)
        return masked_sdpa(query, key, value, mask, scale, dropout)
    grouped = query.size(1) != key.size(1)
    return functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def masked_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """Attention to the keys of `mask` [q, k] (True is visible), or to all."""
    grouped = query.size(1) != key.size(1)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )


def visible_keys(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which of the keys each of the last `queries` positions sees, [q, k]; None where a single query sees them all."""
    if queries == 1 and (window is None or keys <= window):
        return None
    before = keys - queries
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(before)
    return mask if window is None else mask.triu(before - window + 1)


def sink_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, sinks: Tensor, dropout: float
) -> Tensor:
    """Attention whose softmax has one more logit per head, which carries no value.

    The sink is a key that all queries see: heads get components that are zero everywhere but in one place, where the
    query has sink / scale and the sink's key has 1. So torch's kernels compute it as they are.
    """
    b, g, k, d = key.shape
    logit = (sinks / scale).to(query.dtype).view(1, -1, 1, 1).expand(b, -1, query.size(2), 1)
    query = functional.pad(torch.cat([query, logit], -1), (0, SINK_WIDTH - 1))
    sink = torch.zeros(b, g, 1, d + SINK_WIDTH, dtype=key.dtype, device=key.device)
    sink[..., d] = 1
    key = torch.cat([functional.pad(key, (0, SINK_WIDTH)), sink], 2)
    value = functional.pad(value, (0, SINK_WIDTH, 0, 1))
    mask = None if mask is None else functional.pad(mask, (0, 1), value=True)
    return masked_sdpa(query, key, value, mask, scale, dropout)[..., :d]


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float, dropout: float
) -> Tensor:
    """Attention with scores c * tanh(scores / c), for which torch has no kernel.

    Where a gradient is wanted, the scores are computed again in the backward pass instead of being kept.
    """
    arguments = (query, key, value, mask, scale, softcap, dropout)
    if torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value)):
        return checkpoint(_capped_attention, *arguments, use_reentrant=False, preserve_rng_state=dropout > 0)
    return _capped_attention(*arguments)


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float, dropout: float
) -> Tensor:
    b, n, q, d = query.shape
    grouped = query.reshape(b, key.size(1), -1, q, d)  # [b, g, n/g, q, d]
    scores = torch.matmul(grouped, key.unsqueeze(2).transpose(-1, -2)).mul(scale / softcap).tanh().mul(softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    weights = functional.dropout(weights, dropout)
    return torch.matmul(weights, value.unsqueeze(2)).view(b, n, q, -1)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as a megatron-core norm layer.

    megatron-core's own wrapper refuses sequence parallelism. Under it each rank sees a slice of the tokens, so the
    weight's gradient is partial: the mark `sequence_parallel` makes megatron-core reduce it over the TP group.

    With `layernorm_zero_centered_gamma` the factor is 1 + weight, computed in float32 (Gemma).
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)  # another type than the input's is slow
        self.weight.sequence_parallel = config.sequence_parallel
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        if not self.zero_centered:
            return super().forward(x)
        factor = 1.0 + self.weight.float()
        return functional.rms_norm(x.float(), self.normalized_shape, factor, self.eps).to(x.dtype)
