"""Warnings of foreign packages that a user of ours can do nothing about: which, and why each is safe to leave out.

Every process of a launch would print them, on every start, around the lines that matter.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """A warning that is known and needs nothing.

    Attributes:
        message: regular expression of its beginning.
        category: its class.
        reason: why it needs nothing.
    """

    message: str
    category: type[Warning]
    reason: str


EXPECTED = (
    Expected(
        r"(Transformer Engine and )?Apex (are|is) not installed",
        UserWarning,
        "megatron-core uses them when present; none is needed here, by design",
    ),
    Expected(
        r"full scope is deprecated. Use empty cuda_graph_scope",
        UserWarning,
        "about megatron-core 0.16's own default; CUDA graphs are not used",
    ),
    Expected(
        r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
        FutureWarning,
        "megatron-core 0.16 calls them by their former names, which torch still keeps",
    ),
    Expected(
        r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
        UserWarning,
        "megatron-core's distributed optimizer clears .grad of its shards, which are views, to be on the safe side",
    ),
)

# (logger, beginning of the message, why it needs nothing)
LOGGED = (
    (
        "megatron.core.transformer.transformer_layer",
        "Unknown MLP type",
        "models.mlp.GatedMLP is a subclass of megatron-core's MLP, built with the arguments that has by default",
    ),
)


def silence() -> None:
    """Leave the expected warnings out, in this process; called by a program before it imports megatron-core.

    `python -W error` and PYTHONWARNINGS keep their say: what a user asks for there is not overruled.
    """
    for logger, beginning, _ in LOGGED:
        logging.getLogger(logger).addFilter(_without(beginning))
    if sys.warnoptions:
        return
    for expected in EXPECTED:
        warnings.filterwarnings("ignore", message=expected.message, category=expected.category)


def _without(beginning: str) -> Callable[[logging.LogRecord], bool]:
    """A filter of log records that leaves out messages that begin so."""
    return lambda record: not record.getMessage().startswith(beginning)
