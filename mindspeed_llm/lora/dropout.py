"""Dropout of an adapter's input: which rows and columns it drops, on every rank.

peft's rule: only the adapter sees the dropped input, the frozen layer sees the whole one. Ranks that hold the same
input must drop the same of it, ranks that hold shares of an input must drop independently. A mask therefore comes from
a seed that all ranks of a layer draw alike from torch's host generator, and from the number of the rank's share. The
host generator is saved and put back by activation recomputation and by checkpoints; a mask is made again in the
backward pass rather than kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SPREAD = 0x9E3779B1  # odd: shares of one seed differ in the 32 bits that a CPU's generator looks at


@dataclass(frozen=True)
class Dropout:
    """One call's dropout of x: which elements stay, and their factor 1 / (1 - p).

    Attributes:
        p: probability that an element is dropped.
        seed: of the mask.
    """

    p: float
    seed: int

    @classmethod
    def draw(cls, p: float, share: int) -> "Dropout":
        """Draw the next call's seed.

        Args:
            share: number of this rank's share of the input; equal where ranks hold the same input.
        """
        return cls(p, (int(torch.randint(1 << 32, ())) + share * SPREAD) % (1 << 32))

    def factors(self, x: Tensor) -> Tensor:
        """0 or 1 / (1 - p) for every element of x, in its dtype; the same at every call."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        kept = torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(1 - self.p, generator=generator)
        return kept.div_(1 - self.p)
