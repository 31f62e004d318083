"""Experts in the live model: choosing, balancing, types, places; and what a wrong tensor would do."""

import numpy
import pytest
import torch

from tests.distributed.pool import pool
from tests.models.tiny_moe import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3_YARN,
    GLM4_MOE,
    GPT_OSS,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    Tiny,
    build,
    saved,
    tokens,
)

WORKER = "tests.models.moe_worker:"


@pytest.mark.parametrize(
    "one", [QWEN3_MOE, QWEN2_MOE, MIXTRAL, GLM4_MOE, GPT_OSS, DEEPSEEK_V2_LITE, DEEPSEEK_V3_YARN], ids=str
)
def test_every_tensor_of_the_live_model_counts(one: Tiny) -> None:
    """So the parity tests would see any of them misplaced."""
    ids = tokens(rows=4, length=24)
    assert pool(1).run(WORKER + "without_effect", folder=saved(one), ids=ids.numpy()) == [[]]


@pytest.mark.parametrize("one", [DEEPSEEK_V3_YARN, GLM4_MOE], ids=str)
def test_router_corrections_stay_float32_in_a_bf16_model(one: Tiny) -> None:
    (found,) = pool(1).run(WORKER + "types", folder=saved(one))
    wide = {name for name, dtype in found.items() if dtype == "torch.float32"}
    assert wide == {f"decoder.layers.{layer}.mlp.router.expert_bias" for layer in (1, 2)}
    assert set(found.values()) == {"torch.float32", "torch.bfloat16"}


def test_the_auxiliary_loss_has_the_gradient_of_its_closed_form() -> None:
    """coefficient x experts x sum over experts of (share of the choices) x (mean probability)."""
    weight = build(QWEN3_MOE).state_dict()["model.layers.0.mlp.gate.weight"].requires_grad_()
    hidden = torch.randn(11, 2, 40, generator=torch.Generator().manual_seed(0))
    scores = (hidden.flatten(0, 1) @ weight.t()).softmax(-1)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(3).indices, 1.0)
    (0.3 * 8 * (chosen.mean(0) / 3 * scores.mean(0)).sum()).backward()
    arguments = {"folder": saved(QWEN3_MOE), "hidden": hidden.numpy()}
    (found,) = pool(1).run(WORKER + "balance", **arguments, coefficient=0.3, training=True)
    assert numpy.allclose(found, weight.grad.numpy(), rtol=1e-4, atol=1e-6) and abs(found).max() > 1e-3


@pytest.mark.parametrize(("coefficient", "training"), [(0.3, False), (0.0, True)])
def test_no_auxiliary_loss_outside_training_or_without_a_coefficient(coefficient: float, training: bool) -> None:
    hidden = numpy.random.default_rng(0).standard_normal((11, 2, 40)).astype(numpy.float32)
    arguments = {"folder": saved(QWEN3_MOE), "hidden": hidden, "coefficient": coefficient, "training": training}
    (found,) = pool(1).run(WORKER + "balance", **arguments)
    assert not found.any()


@pytest.mark.distributed
def test_experts_are_handed_out_in_blocks() -> None:
    found = pool(2).run(WORKER + "place_message", experts=8, expert=2)
    assert found == ["(0, 4, 0, 1)", "(4, 4, 0, 1)"]


@pytest.mark.distributed
def test_sizes_that_do_not_divide_are_refused_by_name() -> None:
    (message, _) = pool(2).run(WORKER + "place_message", experts=7, expert=2)
    assert message.startswith("--expert-model-parallel-size 2 does not divide the model's 7 experts")
    (message, _) = pool(2).run(WORKER + "start_message", expert=4, expert_tensor=1)
    assert message.startswith("2 processes cannot hold expert-tensor-parallel-size 1 x expert-model-parallel-size 4")


@pytest.mark.distributed
@pytest.mark.parametrize("lengths", [[3, 1], [0, 2], [2, 2]])
def test_ranks_with_different_numbers_of_tokens_gather_them(lengths: list[int]) -> None:
    expected = [[float(rank)] * length for rank, length in enumerate(lengths)]
    assert pool(2).run(WORKER + "gathered", lengths=lengths) == [expected, expected]
