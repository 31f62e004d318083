"""What a network says on the way through, and how two of them are held against each other.

Shapes: s tokens, h hidden, v vocabulary.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

TOLERANCE = 1e-5
"""Largest difference of two float32 logits, in units of max(1, their standard deviation)."""
SMALL = 1e-4
"""What `TOLERANCE` may be of values that are themselves small: logits near 0 would agree whatever the weights."""
ROWS = 16
"""Rows of logits compared at once."""


@dataclass
class Trace:
    """One run over the text.

    Attributes:
        inputs, outputs: of each decoder layer, [s, h]; empty when nobody compares layers.
        logits: [s, v].
        layer_differences: of each layer on the truth's input: the largest difference, and the scale it is judged by.
    """

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None
    layer_differences: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Agreement:
    """How far two runs are apart.

    Attributes:
        truth, subject: what was run, for people.
        dtype: of weights and activations.
        largest: of |difference of logits|.
        std: of the truth's logits.
        allowed: the difference that is allowed.
        top1: share of positions with the same most likely token.
        flips: positions where it differs although the truth's margin exceeds what is allowed.
        layer: number of the layer that differs most on the truth's own input; None when layers were not compared.
        layer_difference, layer_allowed: its difference.
    """

    truth: str
    subject: str
    dtype: str
    largest: float
    std: float
    allowed: float
    top1: float
    flips: int
    layer: int | None = None
    layer_difference: float = 0.0
    layer_allowed: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it is the same network. A NaN is never within what is allowed."""
        layers = self.layer is None or self.layer_difference <= self.layer_allowed
        return self.largest <= self.allowed and self.flips == 0 and layers

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "passed": self.passed}


def allowed_difference(scale: float) -> float:
    """The difference allowed between values of this scale: 1e-5 x max(1, scale), and no more than 1e-4 x scale."""
    return min(TOLERANCE * max(1.0, scale), SMALL * scale)


def layer_difference(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """(largest difference, largest value) of a layer's output [s, h] on the same input."""
    return float((found - wanted).abs().max()), float(wanted.abs().max())


def compare(truth: Trace, subject: Trace, truth_name: str, subject_name: str, dtype: str = "float32") -> Agreement:
    """Hold the logits of two runs, and where there are any the layers' differences, against each other."""
    wanted, found = truth.logits, subject.logits
    std = float(wanted.std())
    allowed = allowed_difference(std)
    largest, same, flips = 0.0, 0, 0
    for start in range(0, wanted.size(0), ROWS):
        ours, theirs = found[start : start + ROWS], wanted[start : start + ROWS]
        difference = float((ours - theirs).abs().max())
        largest = difference if difference != difference else max(largest, difference)
        if largest != largest:
            break
        best = theirs.topk(2, dim=-1)
        agree = ours.argmax(-1) == best.indices[:, 0]
        clear = best.values[:, 0] - best.values[:, 1] > allowed
        same, flips = same + int(agree.sum()), flips + int((~agree & clear).sum())
    top1 = same / wanted.size(0)
    worst = worst_layer(subject.layer_differences)
    return Agreement(truth_name, subject_name, dtype, largest, std, allowed, top1, flips, *worst)


def worst_layer(differences: list[tuple[float, float]]) -> tuple[int | None, float, float]:
    """(number, difference, allowed difference) of the layer that differs most for its scale."""
    if not differences:
        return None, 0.0, 0.0
    judged = [(value, allowed_difference(scale)) for value, scale in differences]
    excess = [value / max(allowed, 1e-30) if value == value else float("inf") for value, allowed in judged]
    number = excess.index(max(excess))
    return number, *judged[number]
