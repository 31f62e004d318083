"""What one rank reports of a run; plain data that pytest's process reads without megatron-core."""

from collections import Counter
from dataclasses import dataclass, field

import numpy

from tests.distributed.cases import Arrays
from tests.distributed.collectives import Seen


@dataclass
class Result:
    """What one rank saw; tensors are its own shares, by logical name.

    Attributes:
        tp, pp, dp, cp: its place; etp: which part of its experts it holds.
        logits: per micro-batch it ran, [m, v]; empty before the last stage.
        gradients: after the first global batch. trained: after the last step.
        parameter_bytes: of all its parameters.
        collectives: of the first global batch, forward and backward.
        frozen_changed: base weights that training changed.
    """

    tp: int
    pp: int
    dp: int
    cp: int = 0
    etp: int = 0
    logits: list[numpy.ndarray] = field(default_factory=list)
    gradients: Arrays = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    trained: Arrays = field(default_factory=dict)
    parameter_bytes: int = 0
    collectives: Seen = field(default_factory=Counter)
    frozen_changed: list[str] = field(default_factory=list)


FIELDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerState:
    """Whole tensors by field and logical name, and Adam's step count."""

    fields: dict[str, Arrays]
    count: int


@dataclass
class Continued:
    """One rank after some steps: its shares of the optimizer's state by field, of the weights, and every loss."""

    tp: int
    pp: int
    losses: list[float]
    fields: dict[str, Arrays]
    count: int
    trained: Arrays
