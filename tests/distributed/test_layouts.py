"""Every layout computes what transformers, peft and torch's AdamW compute, at the cost it should have."""

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.cases import Case
from tests.distributed.collectives import totals
from tests.distributed.compare import TOLERANCE, assert_close, assert_exact, gathered, reference_of, results
from tests.distributed.expected import collectives, parameter_bytes
from tests.distributed.flat import steps_for
from tests.distributed.reference import IGNORE, first_gradients_in_float32

SP = {"tensor": 2, "sequence_parallel": True}
VPP = {"pipeline": 2, "virtual_layers": 1}

LAYOUTS = (
    Case(),
    Case(world=2, tensor=2),
    Case(world=2, **SP),
    Case(world=2, pipeline=2),
    Case(world=2, **VPP),
    Case(world=2),
    Case(world=2, distributed_optimizer=True),
    Case(world=4, pipeline=2, **SP),
)
MODULAR = tuple(replace(case, fused=False) for case in LAYOUTS)
RECOMPUTED = (
    *(replace(case, recompute="full") for case in LAYOUTS),
    Case(recompute="selective"),
    Case(world=2, recompute="selective", **SP),
    Case(world=4, pipeline=2, recompute="full", fused=False, **SP),
)
TIED = (
    Case(tied=True),
    Case(world=2, tied=True, **SP),
    Case(world=2, tied=True, pipeline=2),
    Case(world=2, tied=True, **VPP),
    Case(world=4, tied=True, pipeline=2, **SP),
)
PADDED = (
    Case(ragged=False),
    Case(world=2, ragged=False, **SP),
    Case(world=2, ragged=False, **VPP),
    Case(world=2, ragged=False, distributed_optimizer=True),
    Case(world=4, ragged=False, pipeline=2, **SP),
)
PER_TOKEN = (
    Case(per_token=True),
    Case(world=2, per_token=True),
    Case(world=2, per_token=True, distributed_optimizer=True),
    Case(world=2, per_token=True, pipeline=2),
    Case(world=4, per_token=True, pipeline=2, **SP),
)
PACKED = (
    *(replace(case, packed=True) for case in LAYOUTS),
    Case(packed=True, recompute="full"),
    Case(world=2, packed=True, recompute="selective", **SP),
    Case(world=2, packed=True, recompute="full", **VPP),
    Case(world=2, packed=True, per_token=True),
    Case(world=4, packed=True, pipeline=2, recompute="full", fused=False, **SP),
)
COMBINED = (
    Case(world=2, distributed_optimizer=True, overlap=True),
    Case(world=2, distributed_optimizer=True, overlap=True, fused=False),
    Case(world=4, distributed_optimizer=True, overlap=True, **VPP),
    Case(world=4, distributed_optimizer=True, **SP),
    Case(world=4, pipeline=2, distributed_optimizer=True),
    Case(world=4, virtual_layers=1, pipeline=2, **SP),
)
FUSED_MLP = tuple(
    replace(case, fused_mlp=True)
    for case in (
        *LAYOUTS,
        Case(world=2, recompute="selective", **SP),
        Case(world=2, distributed_optimizer=True, overlap=True),
        Case(world=4, distributed_optimizer=True, overlap=True, **VPP),
        Case(world=4, virtual_layers=1, pipeline=2, recompute="full", **SP),
    )
)
ADAPTERS = (*LAYOUTS, *FUSED_MLP, *MODULAR, *RECOMPUTED, *TIED, *PADDED, *PACKED, *PER_TOKEN, *COMBINED)
FULL_TUNING = tuple(
    replace(case, lora=False)
    for case in (
        Case(),
        Case(tied=True),
        Case(world=2, **SP),
        Case(world=2, packed=True, steps=1, **SP),
        Case(world=2, pipeline=2, tied=True),
        Case(world=2, distributed_optimizer=True),
        Case(world=2, distributed_optimizer=True, overlap=True),
        Case(world=4, distributed_optimizer=True, overlap=True, **VPP),
        Case(world=4, pipeline=2, tied=True, **SP),
        Case(world=4, pipeline=2, recompute="full", **SP),
    )
)
every_adapter = pytest.mark.parametrize("case", ADAPTERS, ids=str)
every_case = pytest.mark.parametrize("case", (*ADAPTERS, *FULL_TUNING), ids=str)


@every_case
def test_logits_losses_and_every_gradient_equal_the_reference(case: Case) -> None:
    assert_exact(case, results(case))


@pytest.mark.parametrize("layout", [{}, {"world": 2, **SP}, {"world": 2, **VPP}], ids=["TP1", "TP2 SP", "PP2 VPP2"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "modular"])
def test_some_layers_computed_again_change_nothing(layout: dict[str, Any], fused: bool) -> None:
    case = Case(recompute="block", fused=fused, **layout)
    assert_exact(case, results(case))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "padded"])
@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "full-tuning"])
def test_float32_can_tell_the_models_gradients_to_half_of_the_tolerance(lora: bool, ragged: bool, tied: bool) -> None:
    truth = reference_of(Case(lora=lora, ragged=ragged, tied=tied)).gradients
    for name, value in first_gradients_in_float32(tied, lora, ragged).items():
        assert_close(value, truth[name], name, TOLERANCE / 2)


@every_case
def test_the_bytes_of_parameters_per_rank_follow_from_the_sizes(case: Case) -> None:
    for report in results(case):
        assert report.parameter_bytes == parameter_bytes(case, report.pp)


@every_adapter
def test_exactly_the_expected_collectives_are_seen(case: Case) -> None:
    (step,) = steps_for(case, reference_of(case).steps[:1])
    for report in results(case):
        assert report.collectives == collectives(case, report.pp, report.dp, step)


@every_adapter
def test_frozen_weights_are_bit_identical_after_training(case: Case) -> None:
    assert [report.frozen_changed for report in results(case)] == [[]] * case.world


@every_case
def test_trained_weights_are_identical_on_all_replicas_and_all_have_moved(case: Case) -> None:
    trained = gathered(results(case), "trained", case)
    truth = reference_of(case)
    assert set(trained) == set(truth.trained)
    for name, before in truth.adapter.items():
        assert (trained[name] != before).mean() > 0.9, name


@every_case
def test_every_rank_reports_the_tokens_of_the_global_batch(case: Case) -> None:
    expected = [sum(int((b["labels"] != IGNORE).sum()) for b in step) for step in reference_of(case).steps]
    for report in results(case):
        assert report.tokens
        assert report.tokens == expected[: len(report.tokens)]


@pytest.mark.parametrize("case", [case for case in LAYOUTS if case.tensor > 1], ids=str)
def test_the_fused_form_communicates_less_than_the_modular_one(case: Case) -> None:
    fused, modular = (totals(results(replace(case, fused=fused))[0].collectives) for fused in (True, False))
    assert set(fused) == set(modular)
    for key, (count, nbytes) in fused.items():
        less = key[1] == "tp" and (key[0] != "all_reduce" or not case.sequence_parallel)
        assert count < modular[key][0] if less else count == modular[key][0], key
        assert nbytes <= modular[key][1]
    if case.sequence_parallel:
        assert fused["all_gather", "tp"][1] < modular["all_gather", "tp"][1]


def test_data_parallel_ranks_see_different_numbers_of_tokens() -> None:
    step = reference_of(Case()).steps[0]
    counts = [sum(int((b["labels"] != IGNORE).sum()) for b in step[rank::2]) for rank in (0, 1)]
    assert counts[0] != counts[1]
