"""Experts and context parallelism: every layout computes what transformers, peft and torch's AdamW compute."""

from dataclasses import replace

import pytest

from tests.distributed.cases import Case
from tests.distributed.compare import TOLERANCE, assert_close, assert_exact, gathered, reference_of, results
from tests.distributed.moe_reference import MODELS, first_gradients_in_float32
from tests.distributed.pool import pool

SP = {"tensor": 2, "sequence_parallel": True}
VPP = {"pipeline": 2, "virtual_layers": 1}
SPREAD = {"world": 2, "expert": 2, "expert_tensor": 1, **SP}
MOE = Case(model="qwen3-moe", fused=False)


def moe(**fields: object) -> Case:
    """A case of the tiny Qwen3-MoE."""
    return replace(MOE, **fields)


EXPERTS = (
    MOE,
    moe(world=2, expert=2),
    moe(world=2),
    moe(world=2, apart=True, **SP),
    moe(world=2, expert_tensor=1, **SP),
    moe(world=2, expert=2, expert_tensor=1, **SP),
    moe(world=2, pipeline=2),
    moe(world=2, **VPP),
    moe(world=2, context=2),
    moe(world=2, context=2, expert=2),
    moe(world=2, distributed_optimizer=True, expert=2),
    moe(world=4, expert=2),
    moe(world=4, expert=2, **SP),
    moe(world=4, expert=2, distributed_optimizer=True, overlap=True),
    moe(world=4, expert=2, expert_tensor=1, distributed_optimizer=True, **SP),
    moe(world=4, expert=2, pipeline=2),
    moe(world=4, expert=2, expert_tensor=1, **SP, **VPP),
    moe(world=4, context=2, expert=2, expert_tensor=1, **SP),
)
RECOMPUTED = (
    moe(recompute="full", balance=0.3),
    moe(world=2, recompute="full", expert=2, expert_tensor=1, balance=0.3, **SP),
)
BALANCED = (
    moe(balance=0.3, z_loss=0.01),
    moe(balance=0.3, balance_rows=True),
    moe(world=2, expert=2, balance=0.3, z_loss=0.01),
    moe(world=2, context=2, balance=0.3, z_loss=0.01),
    moe(world=2, expert_tensor=1, expert=2, balance=0.3, z_loss=0.01, **SP),
    moe(world=2, balance=0.3, per_token=True),
    moe(world=4, context=2, expert=2, balance=0.3, per_token=True, **SP),
    moe(world=4, expert=2, expert_tensor=1, balance=0.3, z_loss=0.01, pipeline=2, **SP),
)
LATE = (
    moe(model="qwen3-moe-late", world=2, pipeline=2),
    moe(model="qwen3-moe-late", world=4, pipeline=2, expert=2, distributed_optimizer=True),
)
PACKED = (
    moe(packed=True, balance=0.3),
    moe(packed=True, balance=0.3, **SPREAD),
)
FAMILIES = (
    *(
        replace(MOE, model=model, steps=2, **layout)
        for model in ("mixtral", "qwen2-moe", "glm4-moe", "deepseek-v3", "deepseek-v2", "gpt-oss")
        for layout in ({}, SPREAD)
    ),
    *(replace(MOE, model=model, steps=2, world=2, context=2) for model in ("deepseek-v3", "deepseek-v2", "gpt-oss")),
)
FULL = tuple(
    replace(case, lora=False, balance=0.3)
    for case in (
        MOE,
        moe(world=2, expert=2, apart=True),
        moe(world=2, expert_tensor=1, **SP),
        moe(world=4, expert=2, expert_tensor=1, distributed_optimizer=True, **SP),
    )
)
PADDED = Case(world=2, context=2, ragged=False)
CONTEXT = (
    PADDED,
    replace(PADDED, per_token=True, fused=False),
    replace(PADDED, world=4, **SP),
    replace(PADDED, world=4, **VPP),
    replace(PADDED, world=4, distributed_optimizer=True, overlap=True),
    replace(PADDED, lora=False, recompute="full"),
)
CUT = Case(world=2, context=2, packed=True)
PACKED_CONTEXT = (
    CUT,
    replace(CUT, fused=False, per_token=True),
    replace(CUT, fused_mlp=True, recompute="full"),
    replace(CUT, lora=False, steps=1),
    replace(CUT, world=4, tensor=2),
    replace(CUT, world=4, fused=False, **SP),
    replace(CUT, world=4, recompute="selective", **SP),
    replace(CUT, world=4, context=4),
    replace(CUT, world=4),
    replace(CUT, world=4, fused=False, distributed_optimizer=True, overlap=True),
    replace(CUT, world=4, **VPP),
    moe(world=2, context=2, packed=True, balance=0.3, expert=2),
    replace(MOE, model="deepseek-v3", world=2, context=2, packed=True, steps=2),
    replace(MOE, model="gpt-oss", world=2, context=2, packed=True, steps=2),
)
FUSED = (
    moe(fused=True),
    moe(world=4, fused=True, expert=2, **SP),
    moe(world=2, fused=True, expert=2, expert_tensor=1, recompute="full", apart=True, **SP),
    moe(world=2, fused=True, recompute="full", **SP),
    moe(world=4, fused=True, expert=2, distributed_optimizer=True, overlap=True),
    moe(model="qwen3-moe-late", world=2, fused=True, fused_mlp=True, **SP),
    moe(world=2, fused=True, expert_tensor=2, **SP),
    moe(model="deepseek-v3", world=2, fused=True, expert=2, expert_tensor=1, **SP),
    moe(model="deepseek-v3", world=2, fused=True, fused_mlp=True, steps=2, **SP),
    moe(model="gpt-oss", world=2, fused=True, **SP),
    moe(model="gpt-oss", world=2, fused=True, apart=True, expert=2, steps=2),
    replace(PADDED, fused_mlp=True),
    replace(PADDED, fused_mlp=True, world=4, **SP),
)
ROUTERS = (
    moe(routers=True, balance=0.3),
    moe(routers=True, world=2, expert=2, expert_tensor=1, balance=0.3, z_loss=0.01, fused=True, **SP),
    moe(routers=True, world=2, context=2, recompute="full"),
)
IN_DOUBLE = (
    replace(PADDED, per_token=True, fused=False),
    moe(world=2, fused=True, expert_tensor=2, **SP),
    moe(model="deepseek-v3", world=2, fused=True, fused_mlp=True, **SP),
)
EVERY = (
    *EXPERTS, *RECOMPUTED, *BALANCED, *LATE, *FAMILIES, *FULL, *CONTEXT, *FUSED, *PACKED, *PACKED_CONTEXT, *ROUTERS
)  # fmt: skip


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_logits_losses_norms_and_every_gradient_equal_the_reference(case: Case) -> None:
    reports = results(case)
    assert_exact(case, reports)
    assert [report.frozen_changed for report in reports] == [[]] * case.world
    assert set(gathered(reports, "trained", case)) == set(reference_of(case).trained)


@pytest.mark.parametrize("case", IN_DOUBLE, ids=str)
def test_in_float64_nothing_is_left_of_the_difference_but_the_rounding_of_float32_buffers(case: Case) -> None:
    truth = reference_of(case)
    arguments = {"case": case, "folder": truth.folder, "adapter": truth.adapter, "step": truth.steps[0]}
    reports = pool(case.world).run("tests.distributed.double_worker:gradients", **arguments)
    found = gathered(reports, "gradients", case)
    assert set(found) == set(truth.gradients)
    for name, value in truth.gradients.items():
        assert_close(found[name], value, f"gradient of {name}", 5e-7)


@pytest.mark.parametrize("model", list(MODELS))
def test_a_models_gradients_are_such_that_float32_can_tell_them_to_half_of_the_tolerance(model: str) -> None:
    truth = reference_of(Case(model=model)).gradients
    for name, value in first_gradients_in_float32(model).items():
        assert_close(value, truth[name], name, TOLERANCE / 2)
