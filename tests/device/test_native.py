"""The CPU's own kernels against their definitions in float64, and what takes their place without a compiler."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mindspeed_llm.device import cpu_attention, native, rowwise
from mindspeed_llm.device.segments import Segments

REPO = Path(__file__).resolve().parents[2]
TYPES = [torch.float32, torch.bfloat16]
needs_compiler = pytest.mark.skipif(not native.serves(torch.zeros(1)), reason="this machine has no C compiler")


def draw(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal values that `dtype` holds exactly, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).double()


def close(found: Tensor, truth: Tensor, roundings: int = 1) -> None:
    """Within 4 units in the last place of float32 or so many roundings to bfloat16, and 1e-6 of the largest value."""
    assert found.shape == truth.shape
    one = 2**-8 if found.dtype == torch.bfloat16 else 2**-21
    allowed = truth.abs() * roundings * one + truth.abs().max() * 1e-6
    assert ((found.double() - truth).abs() <= allowed).all()


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """With the kernels, and with torch's operations in their place; -> how often these round."""
    if not request.param:
        monkeypatch.setattr(native, "serves", lambda *tensors: False)
    elif not native.serves(torch.zeros(1)):
        pytest.skip("this machine has no C compiler")
    return 1 if request.param else 3


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (65, 1030)], ids=str)
def test_swiglu_and_its_gradient(either: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    hidden, grad = 3 * draw(shape[0], 2 * shape[1], dtype=dtype), draw(*shape, seed=3, dtype=dtype)
    hidden = hidden.to(dtype).double()
    leaf = hidden.clone().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    out = torch.nn.functional.silu(gate) * up
    (wanted,) = torch.autograd.grad(out, leaf, grad)
    close(rowwise.swiglu(hidden.to(dtype)), out.detach(), either)
    found, act = rowwise.swiglu_backward(grad.to(dtype), hidden.to(dtype))
    close(found, wanted, either)
    close(act, out.detach(), either)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rotated", [8, 6])
@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_are_turned_and_gradients_turned_back(
    either: int, dtype: torch.dtype, rotated: int, interleaved: bool
) -> None:
    angles = draw(5, rotated // 2)
    whole = angles.repeat_interleave(2, 1) if interleaved else torch.cat([angles, angles], 1)
    table = torch.stack([torch.stack([whole.cos(), whole.sin()], 1)] * 2, 1).float()[:, 1]  # [s, 2, r] with a stride
    heads = draw(3, 5, 4, 10, dtype=dtype).to(dtype)[..., :8].permute(1, 0, 2, 3)  # [s, b, h, d] of a wider tensor
    x = heads.clone().requires_grad_() if rotated == 6 else heads.requires_grad_()
    out = rowwise.rotate(x, table, interleaved)
    pairs = x.detach().double()[..., :rotated].clone()
    halves = pairs.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else pairs.chunk(2, -1)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None, None]
    turned = torch.view_as_real(torch.complex(*halves) * turns)  # [s, b, h, r/2, 2]
    wanted = (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)
    error = 0.03 if dtype == torch.bfloat16 else 3e-6
    assert (out.double()[..., :rotated] - wanted).abs().max() <= error
    assert torch.equal(out[..., rotated:], x[..., rotated:])
    grad = draw(*out.shape, seed=5).to(dtype)
    (back,) = torch.autograd.grad(out, x, grad)
    # a rotation is orthogonal: turning the gradient forward again gives what came in
    assert (rowwise.rotate(back, table, interleaved).double() - grad.double()).abs().max() <= 2 * error


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_peaks_and_exponentials_of_rows(either: int, dtype: torch.dtype) -> None:
    wide = 20 * draw(9, 2 * 3000, dtype=dtype)
    logits = wide.to(dtype)[:, ::1][:, :3000]  # rows with a stride
    truth = logits.double()
    logits[3, 17], truth[3, 17] = -torch.inf, -torch.inf
    peaks = rowwise.row_peaks(logits)
    assert torch.equal(peaks.double(), truth.amax(-1))
    untouched = wide.to(dtype)[:, 3000:]
    sums = rowwise.exponentials_(logits, peaks)
    wanted = (truth - peaks.double()[:, None]).exp()
    close(sums, wanted.sum(-1), 4)
    close(logits, wanted)
    assert torch.equal(untouched, wide.to(dtype)[:, 3000:]) and logits[3, 17] == 0


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_no_number_stays_none_and_the_rest_of_the_rows_is_untouched(dtype: torch.dtype) -> None:
    hidden = torch.zeros(4, 64, dtype=dtype)
    hidden[2, 5] = torch.nan
    out = rowwise.swiglu(hidden)
    assert out[2, 5].isnan() and out.isnan().sum() == 1
    logits = torch.zeros(3, 40, dtype=dtype)
    logits[1, 7] = torch.nan
    assert rowwise.exponentials_(logits, torch.zeros(3)).isnan().tolist() == [False, True, False]


def attention_errors(run: Callable, sizes: tuple[int, ...], dtype: torch.dtype) -> list[float]:
    """Relative errors of the three gradients against float64."""
    b, n, g, t, d = sizes
    wide = [draw(t, b, heads, d, seed=heads + k).permute(1, 2, 0, 3) for k, heads in enumerate((n, g, g))]
    inputs = [one.to(dtype) for one in wide]
    grad = draw(b, t, n, d, seed=11).to(dtype).transpose(1, 2)
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs, 0.0, True, scale=0.3)
    leaves = [one.double().requires_grad_() for one in inputs]
    exact = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.3, enable_gqa=True)
    truth = torch.autograd.grad(exact, leaves, grad.double())
    found = run(grad, *inputs, out, sums, 0.3)
    assert [one.shape for one in found] == [one.shape for one in inputs]
    return [float((a.double() - b).norm() / b.norm().clamp(min=1.0)) for a, b in zip(found, truth, strict=True)]


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 2, 2, 1, 8), (2, 4, 2, 33, 16), (3, 2, 1, 200, 8), (1, 6, 3, 300, 24)], ids=str)
def test_gradients_by_products_are_as_exact_as_torchs_kernel(
    sizes: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "SCORES", 1 << 15)  # several blocks, and batches cut into rows
    monkeypatch.setattr(cpu_attention, "QUERIES", (32, 96))
    monkeypatch.setattr(cpu_attention, "SHORT", 0)
    found = attention_errors(cpu_attention.gradients, sizes, dtype)

    def torchs(*given: Tensor | float) -> tuple[Tensor, ...]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *given[:-1], 0.0, True, scale=given[-1]
        )

    allowed = attention_errors(torchs, sizes, dtype)
    assert max(found) <= 1.2 * max(allowed) + 5e-7 and max(found) < (0.01 if dtype == torch.bfloat16 else 2e-6)


def needs_blocks(dtype: torch.dtype) -> None:
    if not native.blocked(torch.zeros(1, dtype=dtype)):
        pytest.skip(f"this CPU has neither tiles nor vectors wide enough for {dtype}")


def heads_of(dtype: torch.dtype, b: int, t: int, n: int, g: int, d: int) -> list[Tensor]:
    """Queries, keys, values and a gradient, laid out as a projection leaves them."""
    return [draw(t, b, h, d, seed=k, dtype=dtype).to(dtype).permute(1, 2, 0, 3) for k, h in enumerate((n, g, g, n))]


def through(attention: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What attention gives, and the gradients of its three inputs."""
    *leaves, grad = (one.to(dtype).detach() for one in inputs)
    out = attention(*(one.requires_grad_() for one in leaves))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def torchs_attention(lengths: tuple[int, ...]) -> Callable[..., Tensor]:
    def attention(*heads: Tensor) -> Tensor:
        parts = zip(*(one.split(lengths, 2) for one in heads), strict=True)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return torch.cat([sdpa(*part, is_causal=True, scale=0.3, enable_gqa=True) for part in parts], 2)

    return attention


def attention_in_blocks(lengths: tuple[int, ...]) -> Callable[..., Tensor]:
    def attention(*heads: Tensor) -> Tensor:
        segments = None if len(lengths) == 1 else Segments(lengths, torch.tensor([0, *lengths]).cumsum(0).int())
        out = cpu_attention.causal(*heads, segments, 0.3, None)
        assert type(out.grad_fn).__name__ == "_BlockAttentionBackward"
        return out

    return attention


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("b", "lengths", "n", "g", "d"),
    [(1, (1,), 1, 1, 32), (2, (33,), 6, 2, 64), (3, (128,), 2, 1, 96), (1, (1100,), 2, 2, 128),
     (1, (5, 1, 64, 0, 30, 200), 4, 2, 64), (1, (600, 31), 3, 1, 32)],
)  # fmt: skip
def test_attention_in_blocks_is_as_exact_as_torchs_kernel(
    b: int, lengths: tuple[int, ...], n: int, g: int, d: int, dtype: torch.dtype
) -> None:
    needs_blocks(dtype)
    inputs = heads_of(dtype, b, sum(lengths), n, g, d)
    truth = through(torchs_attention(lengths), inputs, torch.float64)
    found = through(attention_in_blocks(lengths), inputs, dtype)
    allowed = through(torchs_attention(lengths), inputs, dtype)
    slack, most = (2e-4, 4e-3) if dtype == torch.bfloat16 else (5e-7, 2e-6)
    assert all(one.permute(2, 0, 1, 3).is_contiguous() for one in found)  # as projections take them, without copies
    for ours, theirs, exact in zip(found, allowed, truth, strict=True):
        assert ours.shape == exact.shape and ours.dtype == dtype
        scale = exact.norm().clamp(min=1.0)
        error = (ours.double() - exact).norm() / scale
        assert error <= 1.1 * (theirs.double() - exact).norm() / scale + slack and error < most


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_attention_in_blocks_keeps_nan_to_its_queries_and_is_the_same_with_one_thread(dtype: torch.dtype) -> None:
    needs_blocks(dtype)
    inputs = heads_of(dtype, 2, 300, 4, 2, 64)
    found = through(attention_in_blocks((300,)), inputs, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = through(attention_in_blocks((300,)), inputs, dtype)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    inputs[0][1, 3, 70] = torch.nan
    out = through(attention_in_blocks((300,)), inputs, dtype)[0]
    assert out[1, 3, 70].isnan().all() and out.isnan().sum() == 64


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_attention_in_blocks_gives_the_same_bits_where_no_gradient_is_wanted(dtype: torch.dtype) -> None:
    """A reference without gradients is compared with a policy that has them; recomputation repeats a pass."""
    needs_blocks(dtype)
    *heads, _ = heads_of(dtype, 2, 100, 4, 2, 64)
    features = {"causal": True, "scale": 0.3}
    plain = cpu_attention.attention(*(one.to(dtype) for one in heads), **features)
    assert torch.equal(plain, cpu_attention.attention(*(one.to(dtype).requires_grad_() for one in heads), **features))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_with_more_threads_than_key_heads_query_heads_are_spread(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_blocks(dtype)
    inputs = heads_of(dtype, 1, 90, 6, 2, 32)
    truth = through(torchs_attention((90,)), inputs, torch.float64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = through(attention_in_blocks((90,)), inputs, dtype)
    for ours, exact in zip(found, truth, strict=True):
        error = (ours.double() - exact).norm() / exact.norm()
        assert ours.shape == exact.shape and error < (5e-3 if dtype == torch.bfloat16 else 2e-6)


def test_products_of_torch_are_right_after_attention_in_blocks() -> None:
    """Both set up the tiles of a thread; torch's library may count on what it left."""
    needs_blocks(torch.bfloat16)
    left, right = (draw(256, 256, seed=k).bfloat16() for k in (1, 2))
    before = left @ right
    for lengths in ((40,), (300,)):
        through(attention_in_blocks(lengths), heads_of(torch.bfloat16, 2, sum(lengths), 4, 2, 64), torch.bfloat16)
        assert torch.equal(left @ right, before)


SCRIPT = """
import logging, sys, torch
logging.basicConfig(level=logging.DEBUG)
from mindspeed_llm.device import native
print(native.serves(torch.zeros(1)), native.serves(torch.zeros(1).bfloat16()), native.serves(torch.zeros(1).double()))
"""


@pytest.mark.parametrize(
    ("environment", "says"),
    [({"CC": "/nowhere/cc"}, "/nowhere/cc"), ({"CC": "false"}, "slower"), ({native.ENVIRONMENT_VARIABLE: "0"}, "")],
    ids=["no compiler", "a compiler that fails", "not wanted"],
)
def test_without_a_compiler_torch_does_the_work(environment: dict[str, str], says: str, tmp_path: Path) -> None:
    told = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(REPO), **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=told, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == ["False"] * 3
    assert not list(tmp_path.rglob("*.so")) and says in done.stderr
    assert ("not compiled" in done.stderr) == bool(says)


ASKS = """
import torch
from mindspeed_llm.device import native
print(native.serves(torch.zeros(1)), native.blocked(torch.zeros(1)))
"""


@needs_compiler
def test_a_compiler_that_cannot_make_the_blocks_makes_everything_else(tmp_path: Path) -> None:
    wrapped = tmp_path / "cc"
    refuses = 'case "$*" in *NO_BLOCKS*) ;; *native_attention.c*) exit 1 ;; esac'
    wrapped.write_text(f'#!/bin/sh\n{refuses}\nexec cc "$@"\n', encoding="utf-8")
    wrapped.chmod(0o755)
    told = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(REPO), "CC": str(wrapped)}
    done = subprocess.run([sys.executable, "-c", ASKS], env=told, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "False"], done.stderr


@needs_compiler
def test_kernels_are_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = native._built(())
    before = first.stat().st_mtime_ns
    assert native._built(()) == first and first.stat().st_mtime_ns == before
    assert native._built(("-DBF16",)) != first
    assert sorted(tmp_path.rglob("*")) == sorted([first.parent, first, native._built(("-DBF16",))])


def test_the_runtime_of_the_threads_is_torchs_own() -> None:
    loaded = Path("/proc/self/maps")
    if not loaded.exists() or not native.serves(torch.zeros(1)):
        pytest.skip("no compiler, or no list of loaded libraries")
    runtimes = {line.split()[-1] for line in loaded.read_text().splitlines() if "gomp" in line or "libomp" in line}
    logging.getLogger(__name__).info("%s", runtimes)
    assert len({Path(one).name for one in runtimes}) <= 1


@needs_compiler
def test_a_rotation_in_float32_has_the_bits_of_torchs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    angles = draw(40, 8).float()
    whole = torch.cat([angles, angles], 1)
    x, table = draw(40, 2, 3, 16, seed=4).float(), torch.stack([whole.cos(), whole.sin()], 1)
    found = rowwise.rotate(x, table, False)
    monkeypatch.setattr(native, "serves", lambda *tensors: False)
    assert torch.equal(found, rowwise.rotate(x, table, False))
