"""Families with experts and with latent attention: fp32 logits equal to transformers'."""

import pytest
import torch

from tests.distributed.pool import pool
from tests.models.tiny_moe import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    DEEPSEEK_V3_YARN,
    EVERY,
    GPT_OSS,
    QWEN2_MOE,
    QWEN3_MOE,
    Tiny,
    reference,
    saved,
    tokens,
)

TOLERANCE = 1e-5


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits agree within `TOLERANCE` of their scale, which is not small."""
    scale = float(expected.std())
    assert scale >= 0.5
    assert float((found - expected).abs().max()) <= TOLERANCE * max(1.0, scale)


def found(one: Tiny, ids: torch.Tensor, world: int = 1, **layout: int | bool) -> torch.Tensor:
    """Our logits; those of ranks that share their rows are equal."""
    shares: dict[int, torch.Tensor] = {}
    arguments = {"folder": saved(one), "ids": ids.numpy(), **layout}
    for place, share in pool(world).run("tests.models.moe_worker:logits", **arguments):
        assert torch.equal(shares.setdefault(place, torch.from_numpy(share)), torch.from_numpy(share))
    whole = torch.empty(len(ids), *shares[0].shape[1:])
    for place, share in shares.items():
        whole[place :: len(shares)] = share
    return whole


@pytest.mark.parametrize("one", EVERY, ids=str)
def test_logits_equal_those_of_transformers(one: Tiny) -> None:
    ids = tokens()
    check(found(one, ids), reference(one, ids))


LAYOUTS = {
    "EP2": (2, {"expert": 2}),
    "TP2": (2, {"tensor": 2}),
    "TP2-ETP1": (2, {"tensor": 2, "expert_tensor": 1}),
    "TP2-SP": (2, {"tensor": 2, "sequence_parallel": True}),
    "TP2-SP-EP2-ETP1": (2, {"tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor": 1}),
    "TP2-EP2-ETP2": (4, {"tensor": 2, "expert": 2}),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_spread_over_processes_give_the_same_logits(layout: str) -> None:
    world, sizes = LAYOUTS[layout]
    ids = tokens(rows=3, length=20)
    check(found(QWEN3_MOE, ids, world, **sizes), reference(QWEN3_MOE, ids))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("one", "layout"),
    [
        *((DEEPSEEK_V3, layout) for layout in ("TP2", "TP2-SP", "TP2-SP-EP2-ETP1")),
        (DEEPSEEK_V2_LITE, "TP2"),
        (QWEN2_MOE, "TP2-SP"),
        *((GPT_OSS, layout) for layout in ("EP2", "TP2", "TP2-SP")),
    ],
    ids=str,
)
def test_cut_models_give_the_same_logits(one: Tiny, layout: str) -> None:
    world, sizes = LAYOUTS[layout]
    ids = tokens(rows=3, length=20)
    check(found(one, ids, world, **sizes), reference(one, ids))


CACHED = (QWEN3_MOE, GPT_OSS, DEEPSEEK_V2_LITE, DEEPSEEK_V3_YARN)


@pytest.mark.parametrize("one", CACHED, ids=str)
@pytest.mark.parametrize("layout", [{}, {"pipeline": 3}], ids=["PP1", "PP3"])
def test_a_cache_gives_the_logits_of_whole_sequences(one: Tiny, layout: dict[str, int]) -> None:
    ids, prompt = tokens(length=12), 7
    world = layout.get("pipeline", 1)
    arguments = {"folder": saved(one), "ids": ids.numpy(), "prompt": prompt, **layout}
    for share in pool(world).run("tests.models.moe_worker:cached_logits", **arguments):
        check(torch.from_numpy(share), reference(one, ids)[:, prompt - 1 :])


@pytest.mark.distributed
@pytest.mark.parametrize(
    "sizes",
    [
        ["--expert-model-parallel-size", "2"],
        ["--tensor-model-parallel-size", "2"],
        ["--tensor-model-parallel-size", "2", "--ep", "2", "--expert-tensor-parallel-size", "1"],
    ],
    ids=["EP2", "TP2", "TP2-EP2-ETP1"],
)
def test_a_command_line_spreads_experts(sizes: list[str]) -> None:
    ids = tokens()
    argv = ["--load", str(saved(QWEN3_MOE)), "--fp32", *sizes]
    for share in pool(2).run("tests.models.moe_worker:program_logits", argv=argv, ids=ids.numpy()):
        check(torch.from_numpy(share), reference(QWEN3_MOE, ids)[:, -1])
