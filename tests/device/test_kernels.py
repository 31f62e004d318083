"""Attention and normalisation against their definitions, in double precision."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_llm.device import kernels
from mindspeed_llm.device.segments import Segments


class Largest(TorchDispatchMode):
    """Notes the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return out


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


def featured(query: Tensor, key: Tensor, value: Tensor, window: int | None, cap: float | None, sinks: Any) -> Tensor:
    """The definition with a window, capped scores and sinks; scale 0.3, causal."""
    before, rows = key.size(2) - query.size(2), []
    for i in range(query.size(2)):
        last = before + i + 1
        first = 0 if window is None else max(0, last - window)
        seen_keys, seen_values = (one[:, :, first:last].repeat_interleave(N // G, 1) for one in (key, value))
        scores = 0.3 * torch.einsum("bnd,bnkd->bnk", query[:, :, i], seen_keys)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        weights = scores.exp()
        total = weights.sum(-1) + (0 if sinks is None else sinks.exp())
        rows.append(torch.einsum("bnk,bnkd->bnd", weights, seen_values) / total.unsqueeze(-1))
    return torch.stack(rows, 2)


FEATURES = {
    "window": {"window": 3},
    "window-of-one": {"window": 1},
    "window-wider-than-the-keys": {"window": 20},
    "cap": {"softcap": 0.4},
    "cap-and-window": {"softcap": 0.4, "window": 2},
    "sinks": {"sinks": torch.linspace(-2, 3, N, dtype=torch.float64)},
    "sinks-and-window": {"sinks": torch.linspace(-2, 3, N, dtype=torch.float64), "window": 4},
}


@pytest.mark.parametrize("block", [1024, 3], ids=["one-block", "blocks-of-3"])
@pytest.mark.parametrize(("queries", "keys"), [(8, 8), (3, 8), (1, 8), (1, 1)])
@pytest.mark.parametrize("name", FEATURES)
def test_windows_caps_and_sinks_equal_their_definition_with_their_gradients(
    name: str, queries: int, keys: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BLOCK", block)
    features = FEATURES[name]
    leaves = [one.requires_grad_() for one in tensors(queries, keys)]
    if "sinks" in features:
        leaves.append(features["sinks"].clone().requires_grad_())
        features = {**features, "sinks": leaves[-1]}
    found = kernels.sdpa(*leaves[:3], causal=True, scale=0.3, **features)
    wanted = featured(*leaves[:3], features.get("window"), features.get("softcap"), features.get("sinks"))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-13)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads, sought = (torch.autograd.grad((out * weight).sum(), leaves) for out in (found, wanted))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(grads, sought, strict=True))


def test_capped_scores_are_not_kept_for_the_backward_pass() -> None:
    query, key, value = (one.requires_grad_() for one in tensors(40, 40))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
        kernels.sdpa(query, key, value, causal=True, scale=0.3, softcap=0.4)
    assert max(kept, default=0) < B * N * 40 * 40


@pytest.mark.parametrize("name", ["plain", *FEATURES])
def test_segments_are_attended_to_as_rows_of_their_own_with_their_gradients(name: str) -> None:
    lengths, features = (5, 1, 8, 2), FEATURES.get(name, {})
    leaves = [one[:1].clone().requires_grad_() for one in tensors(sum(lengths), sum(lengths))]
    found = kernels.sdpa(*leaves, causal=True, scale=0.3, segments=Segments(lengths, torch.empty(0)), **features)
    rows = zip(*(one.split(lengths, 2) for one in leaves), strict=True)
    seen = features.get("window"), features.get("softcap"), features.get("sinks")
    wanted = torch.cat([featured(*row, *seen) for row in rows], 2)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-13)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads, sought = (torch.autograd.grad((out * weight).sum(), leaves) for out in (found, wanted))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(grads, sought, strict=True))


def test_no_scores_or_masks_of_a_whole_long_sequence_are_made() -> None:
    lengths = (64,) * 32
    leaves = [torch.randn(1, heads, 2048, 8, requires_grad=True) for heads in (2, 1, 1)]
    with Largest() as largest:
        for features in ({}, {"window": 20}, {"softcap": 2.0}):
            segments = Segments(lengths, torch.empty(0))
            kernels.sdpa(*leaves, causal=True, scale=0.3, segments=segments, **features).sum().backward()
    assert largest.elements <= 2 * 2048 * 64


def test_caps_with_sinks_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="no model has both"):
        kernels.sdpa(*tensors(2, 2), causal=True, scale=0.3, softcap=1.0, sinks=torch.zeros(N))


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


def test_a_zero_centred_norm_multiplies_by_one_plus_its_weight_in_float32() -> None:
    norm = kernels.RMSNorm(config(False, zero_centered=True), 9, eps=0.1).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.5, 0.7, 9))
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(2)).bfloat16()
    wide = x.float()
    expected = wide * (wide.pow(2).mean(-1, keepdim=True) + 0.1).rsqrt() * (1 + norm.weight.float())
    assert norm(x).dtype == torch.bfloat16 and torch.equal(norm(x), expected.bfloat16())


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_norms_weight_says_whether_it_sees_all_tokens(sequence_parallel: bool) -> None:
    assert kernels.RMSNorm(config(sequence_parallel), 4).weight.sequence_parallel is sequence_parallel
