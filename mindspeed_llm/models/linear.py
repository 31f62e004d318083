"""Linear layers of our specs beside megatron-core's column- and row-parallel ones.

Shapes: t tokens, h hidden, f ffn; `/t` = divided by expert tensor parallelism.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn.functional import linear


def with_bias(linear: type[nn.Module], bias: bool) -> type:
    """`linear` for a spec, made with a bias or without, whatever megatron-core asks for.

    megatron-core has one switch for the biases of all layers but q/k/v. The modules made are `linear` itself, not a
    subclass, so whatever is registered for its type (adapters, marks of split weights) finds them.
    """

    class Made:
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return linear(*args, **{**kwargs, "bias": bias})

    Made.__name__ = linear.__name__  # named in megatron-core's errors
    return Made


class PartialSumLinear(RowParallelLinear):
    """An expert's second linear layer with a bias.

    Ranks hold partial sums that the dispatcher adds up afterwards, and each adds the bias to its own: every rank gives
    its equal part of it. (megatron-core refuses a bias under expert tensor parallelism for this.)
    """

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[t, f/t] -> ([t, h] partial sum, [h] this rank's part of the bias)."""
        return super().forward(input_)[0], self.own_bias

    @property
    def own_bias(self) -> Tensor | None:
        """[h], this rank's part of the bias."""
        return None if self.bias is None else self.bias / self.tp_group.size()


class ReplicatedLinear(MegatronModule):
    """A linear layer without bias that every TP rank holds whole.

    Under sequence parallelism it sees this rank's positions, and its gradient has to be summed over the ranks.
    """

    def __init__(self, config: TransformerConfig, in_features: int, out_features: int) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=config.params_dtype))
        self.register_parameter("bias", None)
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.sequence_parallel = self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., in] -> ([..., out], no bias), as megatron-core's linear layers answer."""
        return linear(x, self.weight), None
