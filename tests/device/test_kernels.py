"""Attention and normalisation against their definitions, in double precision."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mindspeed_llm.device import kernels

B, N, G, D = 2, 6, 2, 5  # rows, query heads, key-value heads, head dimension


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    """softmax(scale Q K^T) V position by position; query i stands behind the k - q keys before the block."""
    out = torch.zeros_like(query)
    before = key.size(2) - query.size(2)
    for head in range(N):
        group = head // (N // G)
        for i in range(query.size(2)):
            seen = before + i + 1 if causal else key.size(2)
            scores = scale * torch.einsum("bd,bkd->bk", query[:, head, i], key[:, group, :seen])
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            out[:, head, i] = torch.einsum("bk,bkd->bd", weights, value[:, group, :seen])
    return out


def tensors(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, N, queries, D), (B, G, keys, D), (B, G, keys, D))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [(7, 7, True), (7, 7, False), (3, 7, True), (1, 7, True), (1, 1, True), (3, 7, False)],
    ids=["whole", "not-causal", "continues-a-prefix", "one-token", "first-token", "not-causal-shorter"],
)
def test_attention_equals_its_definition(queries: int, keys: int, causal: bool) -> None:
    query, key, value = tensors(queries, keys)
    found = kernels.sdpa(query, key, value, causal=causal, scale=0.3)
    assert torch.allclose(found, attention(query, key, value, 0.3, causal), rtol=0, atol=1e-13)


def test_attention_with_as_many_key_heads_as_query_heads() -> None:
    query, key, value = tensors(4, 4)
    key, value = (one.repeat_interleave(N // G, 1) for one in (key, value))
    found = kernels.sdpa(query, key, value, causal=True, scale=0.5)
    assert torch.allclose(found, attention(query, key[:, :: N // G], value[:, :: N // G], 0.5, True), atol=1e-13)


def test_a_block_after_a_prefix_gives_what_the_whole_gives() -> None:
    query, key, value = tensors(8, 8)
    whole = kernels.sdpa(query, key, value, causal=True, scale=0.3)
    for start in (2, 5, 7):
        rest = kernels.sdpa(query[:, :, start:], key, value, causal=True, scale=0.3)
        assert torch.allclose(rest, whole[:, :, start:], rtol=0, atol=1e-13)


def config(sequence_parallel: bool, zero_centered: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        sequence_parallel=sequence_parallel, params_dtype=torch.float64, layernorm_zero_centered_gamma=zero_centered
    )


def test_rms_norm_equals_its_definition_and_its_gradient_autograds() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 4, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    norm = kernels.RMSNorm(config(False), 9, eps=0.1).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(9, generator=generator))
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    assert torch.allclose(norm(x), expected, rtol=0, atol=1e-13)
    sought = torch.autograd.grad(expected.sum(), [x, norm.weight])
    found = torch.autograd.grad(norm(x).sum(), [x, norm.weight])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, sought, strict=True))


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_norms_weight_says_whether_it_sees_all_tokens(sequence_parallel: bool) -> None:
    assert kernels.RMSNorm(config(sequence_parallel), 4).weight.sequence_parallel is sequence_parallel
