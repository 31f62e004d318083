"""The gated MLP of a dense layer, which another computation of the same numbers can take the place of.

Shapes: s sequence, b batch, h hidden; `/t` = divided by TP.
"""

from typing import Any, Protocol

from megatron.core.transformer.mlp import MLP
from torch import Tensor


class WholeMlp(Protocol):
    """A computation of the whole MLP."""

    @property
    def active(self) -> bool:
        """Whether it is to be used now."""

    def __call__(self, x: Tensor) -> Tensor:
        """Hidden states to hidden states, in the MLP's layout."""


class GatedMLP(MLP):
    """megatron-core's MLP, unless `whole` computes it in one step.

    Attributes:
        whole: None, or a computation of the same output from the same parameters.
    """

    whole: WholeMlp | None = None

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [s, b, h] ([s/t, b, h] under sequence parallelism) -> (the same shape, bias to be added)."""
        if self.whole is None or not self.whole.active or per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale=per_token_scale, **kwargs)
        return self.whole(hidden_states), None
