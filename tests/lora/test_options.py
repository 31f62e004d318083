"""Every LoRA option trains as peft trains with the same option: logits, losses, every gradient, at every layout."""

from dataclasses import replace

import numpy
import pytest

from tests.distributed.cases import Case
from tests.distributed.compare import assert_close, gathered, own_logits
from tests.distributed.pool import pool
from tests.distributed.worker_result import Result
from tests.lora.options_reference import OPTIONS, SPREAD, Option, truth

pytestmark = pytest.mark.distributed
LAYOUTS = (
    Case(steps=2, fused=False),
    Case(steps=2, world=2, tensor=2),
    Case(steps=2, world=2, tensor=2, sequence_parallel=True, fused=False),
    Case(steps=2, world=2, pipeline=2),
)


SPREADS = (
    Case(model="qwen3-moe", steps=2, world=2, expert=2),
    Case(model="qwen3-moe", steps=2, world=2, context=2),
    Case(model="qwen3-moe", steps=2, world=2, tensor=2, sequence_parallel=True),
    Case(model="qwen3-moe", steps=2, world=2, tensor=2, sequence_parallel=True, expert=2, expert_tensor=1, fused=False),
)


def trained(option: Option, case: Case) -> list[tuple[Result, dict]]:
    task = {"case": case, "folder": option.folder, "option": option, "adapter": truth(option).adapter}
    return pool(case.world).run("tests.lora.options_worker:trained", steps=option.steps(), **task)


def assert_like_peft(option: Option, case: Case) -> None:
    expected, reports = truth(option), trained(option, case)
    results = [result for result, _ in reports]
    if option.fresh:
        begun = gathered([replace(result, trained=before) for result, before in reports], "trained", case)
        for key, value in expected.adapter.items():
            assert_close(begun[key], value, f"first value of {key}")
    for result in results:
        assert_close(numpy.array(result.losses), numpy.array(expected.losses), "losses")
        if result.pp == case.pipeline - 1:
            for number, value in enumerate(expected.logits[result.dp :: case.replicas]):
                real = option.steps()[0][result.dp :: case.replicas][number]["real"]
                own = value[own_logits(real, result.cp, case.context)]
                assert_close(result.logits[number], own, f"logits of micro-batch {number}")
        assert result.frozen_changed == []
    gradients = gathered(results, "gradients", case)
    assert set(gradients) == set(expected.gradients), set(gradients) ^ set(expected.gradients)
    for key, value in expected.gradients.items():
        assert_close(gradients[key], value, f"gradient of {key}")


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_training_with_an_option_equals_peft(name: str, case: Case) -> None:
    assert_like_peft(OPTIONS[name], case)


@pytest.mark.parametrize("case", SPREADS, ids=str)
@pytest.mark.parametrize("name", SPREAD)
def test_options_equal_peft_where_experts_are_spread_and_sequences_cut(name: str, case: Case) -> None:
    assert_like_peft(SPREAD[name], case)


SP = {"steps": 2, "world": 2, "tensor": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("dora", Case(**SP, fault="local-norms")),
        ("dora", Case(**SP, fault="unmarked-lengths")),
        ("rslora-with-patterns", Case(steps=2, fault="plain-scaling")),
        ("pissa", Case(steps=2, fault="kept-base")),
        ("dora-and-whole-modules", Case(steps=2, fault="frozen-copy")),
        ("some-projections", Case(steps=2, fault="every-row")),
        ("dora-of-a-projection", Case(steps=2, fault="every-row")),
        ("embedding", Case(steps=2, world=2, tensor=2, fault="unmasked-lookup")),
        ("pissa", replace(SPREADS[0], fault="kept-base")),
        ("dora", replace(SPREADS[2], fault="local-norms")),
    ],
    ids=str,
)
def test_a_planted_fault_is_noticed(name: str, case: Case) -> None:
    with pytest.raises(AssertionError, match="differs by|mlp|embedding"):
        assert_like_peft((OPTIONS if case.model == "qwen3" else SPREAD)[name], case)
