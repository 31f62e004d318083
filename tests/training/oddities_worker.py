"""What a pool process computes for `test_oddities`: the judging modules import megatron-core."""

import math
import random
from typing import Any

from mindspeed_llm.training.oddities import SpikeDetector, named, suspects


def spikes(rank: int) -> dict[str, list[int]]:
    """Curve -> steps at which a spike is told."""
    draw = random.Random(3)
    noise = [2 + draw.gauss(0, 0.1) for _ in range(400)]
    curves = {
        "noise": noise,
        "spike": [*noise[:30], 6.0, *noise[31:100]],
        "two spikes": [*noise[:30], 6.0, 9.0, *noise[32:100]],
        "level": [*noise[:30], *(one + 4 for one in noise[30:100])],
        "flat": [1.0] * 30 + [1.3] + [1.0] * 30 + [1.1],
        "early": [1.0] * 10 + [50.0] + [1.0] * 5,
        "with nan": [*noise[:10], math.nan, *noise[10:29], 6.0],
    }

    def told(values: list[float], threshold: float) -> list[int]:
        detector = SpikeDetector(threshold)
        return [n for n, value in enumerate(values) if detector.add(value)]

    return {name: told(curve, 10.0) for name, curve in curves.items()} | {"off": told(curves["spike"], 0.0)}


def rows(rank: int) -> dict[str, Any]:
    """Cases of `suspects` and `named`."""
    batch, nan = list(range(10, 18)), math.nan
    usual = {(m, d): 1.0 for m in range(2) for d in range(2)}
    names = [*(f"row {n} of a/b" for n in (0, 2)), "row 1 of c of d", "what fills"]
    return {
        "nan in m1 d0": suspects(batch, {**usual, (1, 0): nan}, 2, 2),
        "nan in two": suspects(batch, {**usual, (1, 0): nan, (0, 1): nan}, 2, 2),
        "highest is m0 d1": suspects(batch, {**usual, (0, 1): 9.0}, 2, 2),
        "unknown": suspects([*batch, -1], {}, 2, 2),
        "named": named([{"name": name} for name in names], range(4)),
        "many": named([{"name": f"row {n} of a/b"} for n in range(20)], range(20)),
    }
