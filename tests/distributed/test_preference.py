"""DPO in every layout: losses, metrics and every gradient equal those of TRL's DPOTrainer on the same pairs."""

from dataclasses import replace
from typing import Any

import numpy
import pytest

from tests.distributed.cases import Case
from tests.distributed.compare import LATER_TOLERANCE, assert_close, gathered
from tests.distributed.moe_reference import sizes_of
from tests.distributed.pool import pool
from tests.distributed.preference_reference import Loss, steps, trained
from tests.distributed.test_layouts import SP, VPP

SIGMOID = Loss(beta=0.5)
LOSSES = (
    SIGMOID,
    Loss("hinge", beta=0.7),
    Loss("ipo", beta=0.4),
    Loss(beta=0.5, smoothing=0.2),
    Loss("robust", beta=0.3, smoothing=0.1),
    Loss(beta=0.5, sft=0.3),
)
LAYOUTS = (
    Case(),
    Case(fused=False),
    Case(packed=True),
    Case(recompute="full"),
    Case(world=2, tensor=2),
    Case(world=2, packed=True, **SP),
    Case(world=2, pipeline=2),
    Case(world=2, **VPP),
    Case(world=2, distributed_optimizer=True, overlap=True),
    Case(world=2, context=2),
    Case(world=2, context=2, packed=True),
    Case(world=4, pipeline=2, fused=False, **SP),
    Case(world=4, distributed_optimizer=True, overlap=True, **VPP),
    Case(world=4, context=2, **SP),
)
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
           "logps/rejected")  # fmt: skip


EXPERTS = (
    Case(model="qwen3-moe"),
    Case(world=2, expert=2, model="qwen3-moe"),
    Case(world=2, expert=2, expert_tensor=1, model="qwen3-moe", **SP),
)


def reports(case: Case, loss: Loss) -> list[Any]:
    truth, pairs = trained(loss, case.model), steps(sizes_of(case).vocab)
    given = {"case": case, "folder": truth.folder, "adapter": truth.adapter, "steps": pairs, "loss": loss}
    return pool(case.world).run("tests.distributed.preference_worker:learn", **given)


def assert_equal(case: Case, loss: Loss) -> None:
    """Everything our processes report is TRL's."""
    truth, found = trained(loss, case.model), reports(case, loss)
    for report in found:
        assert_close(numpy.array(report.losses), numpy.array(truth.losses), "losses")
        assert_close(numpy.array(report.validation), numpy.array(truth.losses[0]), "validation loss")
        for name in METRICS:
            told = numpy.array([step[name] for step in report.figures])
            assert_close(told, numpy.array([step[name] for step in truth.metrics]), name, LATER_TOLERANCE)
    gradients = gathered(found, "gradients", case)
    assert set(gradients) == set(truth.gradients)
    for name, value in truth.gradients.items():
        assert_close(gradients[name], value, f"gradient of {name}")
    for report in found:
        assert_close(numpy.array(report.norms), numpy.array(truth.norms), "norms", LATER_TOLERANCE)
        assert report.frozen_changed == []
        labels = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for batch in steps()[0] for pair in batch)
        assert report.tokens[0] == labels


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(map(str, vars(loss).values())))
def test_every_loss_equals_trls(loss: Loss) -> None:
    assert_equal(Case(), loss)


@pytest.mark.parametrize("case", [*LAYOUTS[1:], *EXPERTS], ids=str)
def test_every_layout_equals_trl(case: Case) -> None:
    assert_equal(case, SIGMOID)


@pytest.mark.parametrize(
    ("case", "loss"),
    [(Case(world=2, context=2), Loss("ipo", beta=0.4)), (Case(world=2, pipeline=2), Loss(beta=0.5, sft=0.3))],
    ids=str,
)
def test_other_losses_equal_trls_where_processes_share_them(case: Case, loss: Loss) -> None:
    assert_equal(case, loss)


@pytest.mark.parametrize(
    ("case", "fault", "where"),
    [
        (Case(), "reference-with-adapter", "losses"),
        (Case(world=2, pipeline=2), "reference-with-adapter", "losses"),
        (Case(), "sequences-mixed", "losses"),
        (Case(), "sides-swapped", "losses"),
        (Case(world=2, context=2), "positions-not-summed", "losses"),
    ],
)
def test_a_planted_fault_is_noticed(case: Case, fault: str, where: str) -> None:
    with pytest.raises(AssertionError, match=where):
        assert_equal(replace(case, fault=fault), SIGMOID)
