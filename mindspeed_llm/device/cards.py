"""What a card can do: memory, products, links. Published figures, unless a row says that it was measured here."""

import time
from dataclasses import dataclass, replace

from mindspeed_llm.device.cpu import free_memory
from mindspeed_llm.errors import lookup

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One accelerator, or a process on a CPU.

    Attributes:
        name: as `--card` gives it.
        memory: bytes.
        tflops: 10^12 operations per second of dense bfloat16 products, at the peak.
        reached: the share of it that products of a training step reach.
        link: bytes per second that it sends to the cards of its node, and `network` to other nodes.
        node: cards of one node.
        origin: where the figures come from.
    """

    name: str
    memory: int
    tflops: float
    reached: float
    link: float
    network: float
    node: int
    origin: str

    @property
    def rate(self) -> float:
        """Operations per second of a step's products."""
        return self.tflops * 1e12 * self.reached


REACHED = 0.5
"""Assumed of every accelerator: no card was measured."""
PUBLISHED = "published peak; the share reached is assumed, not measured"


def published(name: str, gib: float, tflops: float, link: float, node: int = 8, network: float = 25e9) -> Card:
    """A row of the table; link in bytes per second and direction; network: one 200 Gbit/s adapter per card."""
    return Card(name, round(gib * GIB), tflops, REACHED, link, network, node, PUBLISHED)


CARDS = {
    one.name: one
    for one in (
        published("ascend-910b", 64, 313, 196e9),
        published("ascend-910c", 128, 800, 392e9, node=8),
        published("a100", 80, 312, 300e9),
        published("h100", 80, 989, 450e9),
        published("h200", 141, 989, 450e9),
    )
}


def card(
    name: str,
    memory: int | None = None,
    tflops: float | None = None,
    gbps: float | None = None,
    dtype: str = "float32",
) -> Card:
    """A card of the table, with what the user knows better.

    Args:
        memory: bytes. tflops: a rate reached in training, taken as it is. gbps: Gbit/s of every link.
        dtype: of the products measured on a CPU.

    Raises:
        UsageError: no such card.
    """
    chosen = this_cpu(dtype) if name == "cpu" else lookup("--card", name, CARDS)
    given = []
    if memory is not None:
        chosen, given = replace(chosen, memory=memory), [*given, "memory"]
    if tflops is not None:
        chosen, given = replace(chosen, tflops=tflops, reached=1.0), [*given, "rate"]
    if gbps is not None:
        chosen, given = replace(chosen, link=gbps * 1e9 / 8, network=gbps * 1e9 / 8), [*given, "links"]
    return replace(chosen, origin=f"{chosen.origin}; {', '.join(given)} as given") if given else chosen


def this_cpu(dtype: str = "float32", seconds: float = 0.3) -> Card:
    """A process of this machine: free RAM, and the rate of a product of 512 x 1024 x 3072 measured now.

    Links between processes are assumed: 2 GB/s.
    """
    import torch

    kind = getattr(torch, dtype)
    left, right = torch.ones(512, 1024, dtype=kind), torch.ones(1024, 3072, dtype=kind)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(left, right)
        best = max(best, 2 * 512 * 1024 * 3072 / (time.perf_counter() - began))
    return Card(
        "cpu", free_memory(), best / 1e12, 0.8, 2e9, 1e9, 1 << 30, "products measured now, 80 % of them reached"
    )
