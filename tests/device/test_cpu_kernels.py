"""The CPU's norm and segment attention against their definitions."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mindspeed_llm.device import cpu_attention, cpu_kernels, kernels
from mindspeed_llm.device.segments import Segments

LENGTHS = (cpu_attention.SHORT + 30, 1, 40, 7)


def draw(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm_and_gradients(x: Tensor, weight: Tensor, weights: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output, dx and dw of the CPU's norm in `dtype`."""
    config = SimpleNamespace(sequence_parallel=False, params_dtype=dtype, layernorm_zero_centered_gamma=False)
    norm = cpu_kernels.RMSNorm(config, x.size(-1), eps=0.1)
    with torch.no_grad():
        norm.weight.copy_(weight)
    given = x.to(dtype).requires_grad_()
    out = norm(given)
    return [out, *torch.autograd.grad(out, [given, norm.weight], weights.to(dtype))]


@pytest.mark.parametrize("shape", [(3, 4, 9), (2, 5, 3, 7), (5, cpu_kernels.BLOCK // 2 - 1)], ids=str)
def test_the_norm_equals_its_definition_with_its_gradients(shape: tuple[int, ...]) -> None:
    x, weight, weights = draw(*shape), 1 + 0.3 * draw(shape[-1], seed=3), draw(*shape, seed=4)
    found = norm_and_gradients(x, weight, weights, torch.float32)
    leaves = [x.float().double().requires_grad_(), weight.float().double().requires_grad_()]
    out = leaves[0] / (leaves[0].pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * leaves[1]
    wanted = [out, *torch.autograd.grad(out, leaves, weights.float().double())]
    for ours, truth in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == truth.shape
        assert (ours - truth).abs().max() <= 1e-6 * truth.abs().max()


def test_in_bfloat16_the_norm_is_rounded_once() -> None:
    x, weight, weights = draw(6, 32).bfloat16(), (1 + 0.3 * draw(32, seed=3)).bfloat16(), draw(6, 32, seed=4).bfloat16()
    found = norm_and_gradients(x, weight, weights, torch.bfloat16)
    wide = norm_and_gradients(x.double(), weight.double(), weights.double(), torch.float32)
    for ours, truth in zip(found[:2], wide[:2], strict=True):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, truth.bfloat16())


def test_in_float32_the_norm_is_as_near_to_the_truth_as_torchs() -> None:
    x, weight, weights = (one.float() for one in (draw(4000, 64), 1 + 0.3 * draw(64, seed=3), draw(4000, 64, seed=4)))
    found = norm_and_gradients(x, weight, weights, torch.float32)[0]
    truth, torchs = (
        torch.nn.functional.rms_norm(x.to(dtype), (64,), weight.to(dtype), 0.1)
        for dtype in (torch.float64, torch.float32)
    )
    assert (found - truth).norm() < 1.02 * (torchs - truth).norm()


def test_a_frozen_norm_gives_only_the_gradient_of_its_input() -> None:
    config = SimpleNamespace(sequence_parallel=False, params_dtype=torch.float32, layernorm_zero_centered_gamma=False)
    norm = cpu_kernels.RMSNorm(config, 8).requires_grad_(False)
    x = draw(3, 8).float().requires_grad_()
    norm(x).sum().backward()
    assert norm.weight.grad is None and x.grad is not None and not norm(x.detach()).requires_grad


def test_bfloat16_segments_of_all_lengths_are_as_close_to_the_truth_as_torchs_kernel() -> None:
    total = sum(LENGTHS)
    wide = [draw(1, heads, total, 16, seed=n) for n, heads in enumerate((6, 2, 2))]
    weights, segments = draw(1, 6, total, 16, seed=9), Segments(LENGTHS, torch.empty(0))

    def run(attention: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [one.bfloat16().to(dtype).requires_grad_() for one in wide]
        out = attention(*leaves, causal=True, scale=0.25, segments=segments)
        return [out, *torch.autograd.grad(out, leaves, weights.bfloat16().to(dtype))]

    truth = run(kernels.sdpa, torch.float64)
    found, torchs = (run(one, torch.bfloat16) for one in (cpu_attention.attention, kernels.sdpa))
    for ours, theirs, wanted in zip(found, torchs, truth, strict=True):
        assert ours.dtype == torch.bfloat16
        error, allowed = ((one.double() - wanted).norm() / wanted.norm() for one in (ours, theirs))
        assert error <= 1.05 * allowed and error < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_segment_without_tokens_is_passed_over(dtype: torch.dtype) -> None:
    query, key, value = (draw(1, 2, 8, 16, seed=n).to(dtype).requires_grad_() for n in range(3))
    with_empty, without = (Segments(lengths, torch.empty(0)) for lengths in ((5, 0, 3), (5, 3)))
    outs = [cpu_attention.attention(query, key, value, causal=True, scale=0.3, segments=one)
            for one in (with_empty, without)]  # fmt: skip
    grads = [torch.autograd.grad(out.sum(), query)[0] for out in outs]
    assert torch.equal(*outs) and torch.equal(*grads)
