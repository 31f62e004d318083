"""Predictions against measurements."""

from collections.abc import Mapping
from typing import Any

from mindspeed_llm.planning.memory import Memory, memory
from mindspeed_llm.planning.weights import ModelWeights

TOLERANCE = 0.15
NOTHING = 1 << 14  # bytes: counters and flags, which no class predicts


def deviations(predicted: Memory, measured: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Class -> (predicted, measured) bytes, where they differ by more than 15 % of what was measured."""
    found = {**predicted.by_class(), "total": predicted.total}
    assert set(found) == set(measured)
    return {
        name: (found[name], seen)
        for name, seen in measured.items()
        if abs(found[name] - seen) > TOLERANCE * seen + NOTHING
    }


def wrong(job: Any, results: list[dict[str, Any]]) -> dict[int, dict[str, tuple[int, int]]]:
    """Rank -> deviations, ranks without any left out."""
    sums = ModelWeights(job.model, job.lora)
    found = {
        rank: deviations(memory(job, sums, result["stage"]), result["peak"]) for rank, result in enumerate(results)
    }
    return {rank: one for rank, one in found.items() if one}
