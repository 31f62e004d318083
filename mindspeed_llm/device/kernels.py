"""Attention and normalisation in plain torch, for every device.

Shapes: b batch, n query heads, g key-value heads, q query positions, k key positions, d head dimension.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def sdpa(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention by torch's own kernels.

    Args:
        query: [b, n, q, d]; key, value: [b, g, k, d] with n a multiple of g.
        causal: query i sees keys 0..i + k - q, so a query block may continue a cached prefix.
        scale: factor on the scores, usually 1/sqrt(d).

    Returns:
        [b, n, q, d], in memory order [b, q, n, d] where the kernel chooses so.
    """
    grouped = query.size(1) != key.size(1)
    continues = causal and query.size(2) != key.size(2)
    if not continues:
        return functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    mask = None
    if query.size(2) > 1:  # a single query sees every key: no mask
        mask = torch.ones(query.size(2), key.size(2), dtype=torch.bool, device=query.device)
        mask = mask.tril(key.size(2) - query.size(2))
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as a megatron-core norm layer.

    megatron-core's own wrapper refuses sequence parallelism. Under it each rank sees a slice of the tokens, so the
    weight's gradient is partial: the mark `sequence_parallel` makes megatron-core reduce it over the TP group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)  # another type than the input's is slow
        self.weight.sequence_parallel = config.sequence_parallel
