"""transformers in float64 throughout: what it rounds to float32 in a model of any type stays float64 here.

Norms, routers, softmaxes and some rotations are written with casts to float32. A reference that keeps them is a truth
but for rounding of its own, which transformers in float32 shares and we do not. Angles alone stay as they are: they
are float32 by definition, in transformers and here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CASTS = (Tensor.to, Tensor.type, Tensor.float)


class InDouble(TorchFunctionMode):
    """While it is active, float64 tensors are not cast to float32, neither by themselves nor within a softmax."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            wanted = [*args[1:], *kwargs.values()]
            if func is Tensor.float or (func in CASTS and torch.float32 in wanted):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def in_double(model: nn.Module) -> nn.Module:
    """The model with parameters and buffers in float64, but for the frequencies of rotations; values are unchanged."""
    model.double()
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            module.float()
    return model
