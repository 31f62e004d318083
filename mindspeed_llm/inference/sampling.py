"""Choosing the next token from logits [b, v]."""

from collections.abc import Callable

import torch
from torch import Tensor

Sampler = Callable[[Tensor], Tensor]


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row, [b]."""
    return logits.argmax(-1)


def warp(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits with the excluded tokens at -inf: temperature, then top-k, then top-p, as transformers orders them.

    Args:
        top_k: keep this many likeliest tokens (ties with the last one too); 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities reach it.
    """
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1.0:
        ascending, order = logits.sort(dim=-1)
        excluded = ascending.softmax(-1).cumsum(-1) <= 1.0 - top_p
        excluded[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(excluded).scatter(1, order, excluded), -torch.inf)
    return logits


def sampler(temperature: float, top_k: int, top_p: float, seed: int) -> Sampler:
    """Random choice after `warp`, from a CPU generator of its own, so that all ranks draw the same token."""
    generator = torch.Generator().manual_seed(seed)

    def sample(logits: Tensor) -> Tensor:
        probabilities = warp(logits.float().cpu(), temperature, top_k, top_p).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)

    return sample
