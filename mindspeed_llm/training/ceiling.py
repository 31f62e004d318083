"""How fast this device multiplies matrices of the step's own shapes: the ceiling of a step's TFLOP/s."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_llm.device.base import Device
from mindspeed_llm.lora.layers import is_lora_parameter
from mindspeed_llm.training.engine import Engine

SECONDS = 0.2  # spent on one product
LEAST = 3  # timed runs of one product; the best counts


@dataclass(frozen=True)
class Measured:
    """A product [m, k] x [k, n] and its best rate in TFLOP/s."""

    m: int
    k: int
    n: int
    teraflops: float

    def __str__(self) -> str:
        return f"{self.teraflops:.3g} at {self.m} x {self.k} x {self.n}"


def weights_of(engine: Engine) -> list[Tensor]:
    """The matrices this rank multiplies with, one of each shape; adapters and embeddings are not among them."""
    found = {
        tuple(p.shape): p.data
        for chunk in engine.chunks
        for name, p in chunk.named_parameters()
        if p.dim() == 2 and not is_lora_parameter(name) and "embedding" not in name
    }
    return [found[shape] for shape in sorted(found)]


def measure_ceiling(engine: Engine, tokens: int, device: Device) -> list[Measured]:
    """The rates of the forward product and of the input's gradient for each shape, fastest first.

    Args:
        tokens: of a micro-batch on this rank.
    """
    found = []
    for weight in weights_of(engine):
        out, into = weight.shape
        for wide, other in ((into, weight.t()), (out, weight)):
            rows = torch.ones(tokens, wide, dtype=weight.dtype, device=weight.device)
            seconds = best_time(rows, other, device)
            flops = 2 * tokens * out * into
            found.append(Measured(tokens, wide, other.size(1), flops / seconds / 1e12))
    return sorted(found, key=lambda one: -one.teraflops)


def best_time(left: Tensor, right: Tensor, device: Device) -> float:
    """Seconds of the fastest of several products, after one to warm up."""
    result = left @ right
    device.synchronize()
    times: list[float] = []
    while len(times) < LEAST or sum(times) < SECONDS:
        began = time.perf_counter()
        torch.mm(left, right, out=result)
        device.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
