"""Choosing the next token from logits [b, v]."""

from collections.abc import Callable, Sequence

import numpy
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


def question_seed(seed: int, number: int) -> int:
    """The seed of one question's answer: the same however questions are batched or divided over processes."""
    return int(numpy.random.SeedSequence([seed, number]).generate_state(1, numpy.uint64)[0] >> 1)


def sampler(temperature: float, top_k: int, top_p: float, seeds: Sequence[int]) -> Sampler:
    """Random choice after `warp`; each row draws from a CPU generator of its own, so that all ranks draw alike.

    Args:
        seeds: one per row of the logits to come.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def sample(logits: Tensor) -> Tensor:
        probabilities = warp(logits.float().cpu(), temperature, top_k, top_p).softmax(-1)
        rows = zip(probabilities, generators, strict=True)
        return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in rows]).to(logits.device)

    return sample


class BeamSampling:
    """Beam search with sampling: continuations are drawn without replacement, in proportion to their probability."""

    def __init__(self, temperature: float, top_k: int, top_p: float, seed: int) -> None:
        """The generator is a CPU one, so that all ranks draw alike; it goes on from one step to the next."""
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def warp(self, scores: Tensor) -> Tensor:
        """Log-probabilities [k, v] of the next tokens, those excluded at -inf; see `warp`."""
        return warp(scores, self.temperature, self.top_k, self.top_p)

    def rank(self, total: Tensor) -> Tensor:
        """Total log-probabilities [n] with Gumbel noise: their order is that of a draw without replacement."""
        noise = torch.empty(total.shape).exponential_(generator=self.generator).log_().neg_()
        return total + noise.to(total.device)
