"""Optimizer state leaves one layout and enters another: training goes on as if nothing had happened."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest

from tests.distributed.cases import STEPS, Arrays, Case
from tests.distributed.compare import assert_close, reference_of, whole
from tests.distributed.pool import pool
from tests.distributed.test_layouts import SP, VPP
from tests.distributed.worker_result import FIELDS, Continued, OptimizerState


def go_on(case: Case, steps: Sequence[Any], state: OptimizerState | None) -> list[Continued]:
    """Train `steps` at a layout, from a state or from the start."""
    truth = reference_of(case)
    arguments = {"case": case, "folder": truth.folder, "adapter": truth.adapter, "steps": steps, "state": state}
    return pool(case.world).run("tests.distributed.worker:train_on", **arguments)


def joined(reports: Sequence[Continued], tensor: int, held_by: Callable[[Continued], Arrays]) -> Arrays:
    """Whole tensors from every rank's shares, the vocabulary's padding rows left out."""
    shares: dict[str, dict[int, numpy.ndarray]] = {}
    for report in reports:
        for parameter, value in held_by(report).items():
            shares.setdefault(parameter, {})[report.tp] = value
    return {name: whole(name, [share[rank] for rank in range(tensor)]) for name, share in shares.items()}


def put_together(reports: Sequence[Continued], tensor: int) -> OptimizerState:
    """The optimizer's whole state."""
    assert len({report.count for report in reports}) == 1
    fields = {name: joined(reports, tensor, lambda report, name=name: report.fields[name]) for name in FIELDS}
    return OptimizerState(fields, reports[0].count)


def differing(found: Arrays, expected: Arrays) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    assert set(found) == set(expected)
    return [name for name, value in expected.items() if not numpy.array_equal(found[name], value)]


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "full-tuning"])
def test_every_step_at_another_layout_gives_the_losses_of_the_reference(lora: bool) -> None:
    layouts = (
        Case(world=2, tensor=2, lora=lora),
        Case(world=2, pipeline=2, lora=lora),
        Case(world=2, distributed_optimizer=True, lora=lora),
        Case(lora=lora),
    )
    truth = reference_of(layouts[0])
    state, losses = None, []
    for number, case in enumerate(layouts):
        reports = go_on(case, truth.steps[number : number + 1], state)
        state = put_together(reports, case.tensor)
        assert state.count == number + 1
        losses.append(reports[0].losses[0])
    assert_close(numpy.array(losses), numpy.array(truth.losses), "losses")


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype="bfloat16"),
        Case(world=2, **SP),
        Case(world=2, **VPP),
        Case(world=2, distributed_optimizer=True, dtype="bfloat16"),
        Case(world=2, lora=False, dtype="bfloat16", **SP),
    ],
    ids=str,
)
def test_an_interrupted_training_equals_the_uninterrupted_one_bit_for_bit(case: Case) -> None:
    steps = reference_of(case).steps
    through = go_on(case, steps, None)
    first = go_on(case, steps[: STEPS // 2], None)
    second = go_on(case, steps[STEPS // 2 :], put_together(first, case.tensor))
    for one, before, after in zip(through, first, second, strict=True):
        assert before.losses + after.losses == one.losses
    expected, found = (joined(reports, case.tensor, lambda report: report.trained) for reports in (through, second))
    assert differing(found, expected) == []
    expected, found = (put_together(reports, case.tensor) for reports in (through, second))
    assert found.count == expected.count == STEPS
    assert [differing(found.fields[field], expected.fields[field]) for field in FIELDS] == [[], [], []]


@pytest.mark.parametrize("case", [Case(), Case(world=2, distributed_optimizer=True)], ids=str)
def test_before_the_first_step_masters_are_the_weights_and_moments_are_zero(case: Case) -> None:
    truth = reference_of(case)
    state = put_together(go_on(case, (), None), 1)
    assert state.count == 0
    assert all(numpy.array_equal(state.fields["master"][name], value) for name, value in truth.adapter.items())
    assert not any(value.any() for moment in FIELDS[1:] for value in state.fields[moment].values())
