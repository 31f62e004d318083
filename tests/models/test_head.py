"""The output layer and its loss in one function, against torch's cross entropy in double precision."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_llm.device import rowwise
from mindspeed_llm.models import head

ALONE: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
M, H, V = 37, 12, 83


def tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [m, h], a weight with two rows of padding, targets."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator, dtype=torch.float64) for n in (M, V + 2))
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), torch.randint(0, V, (M,), generator=generator)


def run(dtype: torch.dtype, cap: float | None) -> tuple[Tensor, Tensor]:
    """Our losses and the gradient of their weighted sum."""
    hidden, weight, targets = tensors(dtype)
    losses = head.frozen_head_loss(hidden, weight, targets, V, cap, True, ALONE)
    return losses, torch.autograd.grad((losses * torch.linspace(-1, 2, M)).sum(), hidden)[0]


def truth(dtype: torch.dtype, cap: float | None) -> tuple[Tensor, Tensor]:
    """The same by the definition, in float64."""
    hidden, weight, targets = tensors(dtype)
    wide = hidden.detach().double().requires_grad_()
    logits = wide @ weight[:V].double().t()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses, torch.autograd.grad((losses * torch.linspace(-1, 2, M)).sum(), wide)[0]


@pytest.mark.parametrize("cap", [None, 2.5], ids=["plain", "capped"])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 2048), (10, 16)], ids=["at-once", "in-blocks"])
def test_losses_and_gradients_equal_their_definition(
    rows: int, columns: int, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "ROWS", rows)
    monkeypatch.setattr(rowwise, "COLUMNS", columns)
    for found, wanted in zip(run(torch.float32, cap), truth(torch.float32, cap), strict=True):
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    for found, wanted in zip(run(torch.bfloat16, cap), truth(torch.bfloat16, cap), strict=True):
        assert (found - wanted).norm() <= 1e-2 * wanted.norm()


def test_logits_of_all_positions_never_exist_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.elements = max(self.elements, out.numel() if isinstance(out, Tensor) else 0)
            return out

    monkeypatch.setattr(head, "ROWS", 10)
    with Largest() as largest:
        run(torch.float32, None)
    assert largest.elements == (V + 2) * H  # the weight itself; logits of ten positions are fewer
