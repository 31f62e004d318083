"""Steps that went wrong: found by their numbers, told with the rows they were computed from."""

import math
import re
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from megatron.core import parallel_state

from mindspeed_llm.data.dataset import RowSource
from mindspeed_llm.data.sampler import NO_ROW
from mindspeed_llm.training.engine import Engine, StepResult

WINDOW = 50  # steps a value is compared with
LEAST = 20  # of them before anything is judged
NAMED = 16  # rows of one file that a message lists
NORMAL = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
FLAT = 0.02  # least deviation as a share of the median: a curve without noise is no reason to call a ripple a spike


class SpikeDetector:
    """Tells values far above the recent ones: more than `threshold` robust deviations above their median.

    The deviation is the median absolute deviation, scaled to a normal distribution's, so that one spike does not hide
    the next. Values that stay high become the new normal after about WINDOW / 2 steps.
    """

    def __init__(self, threshold: float) -> None:
        """Args: threshold: in deviations; 0 tells nothing."""
        self.threshold = threshold
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, value: float) -> tuple[float, float] | None:
        """Look at the next value; -> (deviations, median) of a spike, None for an ordinary value."""
        if not math.isfinite(value) or not self.threshold:
            return None
        found = None
        if len(self.recent) >= LEAST:
            middle = median(self.recent)
            spread = max(NORMAL * median(abs(one - middle) for one in self.recent), FLAT * abs(middle), 1e-12)
            if value - middle > self.threshold * spread:
                found = (value - middle) / spread, middle
        self.recent.append(value)
        return found


class Oddities:
    """Judges every step; all ranks judge alike, as a step's numbers are theirs together.

    Attributes:
        in_a_row: steps without an update, up to the last one.
        found: what is wrong with the last step, or "".
    """

    def __init__(self, threshold: float) -> None:
        """Args: threshold: see `SpikeDetector`."""
        self.losses, self.norms = SpikeDetector(threshold), SpikeDetector(threshold)
        self.in_a_row, self.found = 0, ""

    def look(self, result: StepResult) -> bool:
        """Judge a step; -> whether something is wrong with it."""
        self.in_a_row = 0 if result.updated else self.in_a_row + 1
        self.found = ""
        if not result.updated:
            finite = math.isfinite(result.loss)
            norm = f"the gradient norm is {result.grad_norm} (the loss is {result.loss:.4f})"
            self.found = f"{norm if finite else f'the loss is {result.loss}'}; the step is not applied"
            return True
        if not result.tokens:
            self.found = "no token has a label"
            return True
        pairs = (("loss", result.loss, self.losses), ("gradient norm", result.grad_norm, self.norms))
        for name, value, detector in pairs:
            spike = detector.add(value)
            if spike is not None and not self.found:
                self.found = f"the {name} is {value:.4g}, {spike[0]:.0f} deviations above the median {spike[1]:.4g}"
        return bool(self.found)


def micro_losses(engine: Engine) -> list[float]:
    """Mean losses of this rank's micro-batches of the last step, its share under CP; empty before the last stage."""
    return [float(report[2]) for report in engine.reports]


def told_by_all(engine: Engine, found: str) -> tuple[str, dict[tuple[int, int], float]]:
    """(what is wrong, loss of each micro-batch by its number and DP rank) on every rank. Collective.

    Shares of CP ranks add up; ranks of a TP group tell the same.
    """
    place = parallel_state.get_data_parallel_rank(), parallel_state.get_context_parallel_rank()
    told: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, (found, place, micro_losses(engine)))
    shares: dict[tuple[int, int, int], float] = {}
    for _, (replica, piece), losses in told:
        shares |= {(number, replica, piece): loss for number, loss in enumerate(losses)}
    sums: dict[tuple[int, int], float] = {}
    for (number, replica, _), loss in sorted(shares.items()):
        sums[number, replica] = sums.get((number, replica), 0.0) + loss
    return next((text for text, _, _ in told if text), ""), sums


def suspects(rows: Sequence[int], losses: dict[tuple[int, int], float], micro: int, replicas: int) -> tuple[list, str]:
    """The rows to look at first, and why these.

    Args:
        rows: of the global batch, see `EpochSampler.global_batch`.
        losses: by micro-batch and DP rank. micro: rows of a micro-batch. replicas: DP size.
    """
    bad = [place for place, loss in losses.items() if not math.isfinite(loss)]
    if bad:
        chosen, why = bad, "rows of the micro-batches whose loss is not finite"
    elif losses and len(losses) > 1:
        highest = max(losses, key=losses.__getitem__)
        chosen, why = [highest], f"rows of the micro-batch with the largest loss ({losses[highest]:.4g})"
    else:
        return [row for row in rows if row != NO_ROW], "rows of the step"
    first = [(number * replicas + replica) * micro for number, replica in sorted(chosen)]
    return [row for start in first for row in rows[start : start + micro] if row != NO_ROW], why


def named(source: RowSource, rows: Sequence[int]) -> str:
    """Rows by file: "3, 17 of data/alpaca; 5 of data/other"."""
    files: dict[str, list[str]] = {}
    for row in rows:
        name = str(source[row]["name"])
        match = re.fullmatch(r"row (\d+) of (.*)", name)
        files.setdefault(match[2] if match else "", []).append(match[1] if match else name)
    parts = []
    for file, numbers in files.items():
        more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
        parts.append(", ".join(numbers[:NAMED]) + more + (f" of {file}" if file else ""))
    return "; ".join(parts)
