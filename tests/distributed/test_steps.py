"""Steps out of the ordinary: micro-batches without a label, validation, gradients that are not finite."""

import math
from dataclasses import replace
from typing import Any

import numpy
import pytest

from tests.distributed.cases import Case
from tests.distributed.compare import assert_close, reference_of
from tests.distributed.pool import pool
from tests.distributed.reference import IGNORE, MicroBatch
from tests.distributed.test_layouts import SP, VPP

LAYOUTS = (
    Case(recompute="full"),
    Case(world=2, **SP),
    Case(world=2, **VPP),
    Case(world=2, distributed_optimizer=True),
)
every_layout = pytest.mark.parametrize("case", LAYOUTS, ids=str)


def run(task: str, case: Case, **arguments: Any) -> list[Any]:
    truth = reference_of(case)
    fixed = {"case": case, "folder": truth.folder, "adapter": truth.adapter}
    return pool(case.world).run(f"tests.distributed.steps_worker:{task}", **fixed, **arguments)


def without_labels(batch: MicroBatch) -> MicroBatch:
    return {**batch, "labels": numpy.full_like(batch["labels"], IGNORE)}


@every_layout
@pytest.mark.parametrize("per_token", [False, True], ids=["per-micro-batch", "per-token"])
def test_micro_batches_without_a_label_add_nothing(case: Case, per_token: bool) -> None:
    case = replace(case, per_token=per_token)
    first, second, *_ = reference_of(case).steps[0]
    # DP ranks take turns: each gets one labelled and one empty micro-batch, against the labelled one twice
    half = [first, second, without_labels(first), without_labels(second)]
    twice = [first, second, first, second]
    none = [without_labels(batch) for batch in twice]
    share = 1.0 if per_token else 0.5  # an empty micro-batch counts among the micro-batches, not among the tokens
    for few, many, nothing in run("gradients", case, global_batches=[half, twice, none]):
        assert 2 * few[1] == many[1]
        assert math.isclose(few[0], share * many[0], rel_tol=1e-6)
        for name, value in many[2].items():
            assert_close(few[2][name], share * value, name)
        assert math.isnan(nothing[0])
        assert nothing[1] == 0
        assert not any(value.any() for value in nothing[2].values())


@every_layout
def test_the_validation_loss_is_the_references_mean_per_token_and_training_goes_on(case: Case) -> None:
    truth = reference_of(replace(case, per_token=True))  # however the run weighs what it trains on
    for loss, of_none, trains in run("validated", case, steps=[truth.steps[0], truth.steps[0]]):
        assert math.isclose(loss, truth.losses[0], rel_tol=1e-5)
        assert math.isnan(of_none)
        assert trains


@pytest.mark.parametrize("case", [Case(world=2, pipeline=2), Case(world=2, distributed_optimizer=True)], ids=str)
def test_a_step_with_gradients_that_are_not_finite_changes_nothing(case: Case) -> None:
    for report in run("broken_step", case, batches=reference_of(case).steps[0]):
        assert report == (False, False, False)
