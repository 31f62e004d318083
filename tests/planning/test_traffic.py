"""Predicted messages and operations equal those a step was seen to make."""

from dataclasses import replace

import pytest

from mindspeed_llm.device.cards import card
from mindspeed_llm.planning.estimate import estimate
from mindspeed_llm.planning.job import Job
from mindspeed_llm.planning.schedule import bubble
from mindspeed_llm.planning.traffic import gradient_traffic, micro_batch_work
from mindspeed_llm.planning.weights import ModelWeights
from tests.planning.jobs import job
from tests.planning.test_memory import JOBS, measured

SENDING = [name for name, one in JOBS.items() if one.cards > 1]
NOTHING = 200_000  # bytes: losses, norms and flags, which are not predicted


def predicted(one: Job, stage: int) -> dict[str, float]:
    """Group -> bytes of a step."""
    sums = ModelWeights(one.model, one.lora)
    work = micro_batch_work(one, sums, stage)
    sent = {name: getattr(work, name) * one.micro_batches for name in ("tensor", "context", "expert", "pipeline")}
    return {**sent, "data": gradient_traffic(one, sums, stage)}


@pytest.mark.distributed
@pytest.mark.parametrize("name", SENDING)
def test_bytes_sent_are_predicted_within_15_percent_for_every_group(name: str) -> None:
    for result in measured(name):
        for group, nbytes in predicted(JOBS[name], result["stage"]).items():
            seen = result["sent"].get(group, 0)
            assert abs(nbytes - seen) <= 0.15 * seen + NOTHING, (group, nbytes, seen)


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in JOBS if name != "EP2"])
def test_operations_of_products_are_predicted_within_5_percent(name: str) -> None:
    """Without attention, which torch's counter does not know on CPUs."""
    one = replace(JOBS[name], length=1, rows=None, micro_batch=JOBS[name].tokens)
    for result in measured(name):
        flops = micro_batch_work(one, ModelWeights(one.model, one.lora), result["stage"]).flops * one.micro_batches
        assert abs(flops - result["flops"]) <= 0.05 * result["flops"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "group"), [("DPO, TP2 SP", "tensor"), ("DPO, PP2", "pipeline"), ("DPO, CP2", "context")]
)
def test_a_forgotten_reference_pass_is_noticed_in_messages_and_operations(name: str, group: str) -> None:
    one = replace(JOBS[name], pairs=False)
    first = measured(name)[0]
    assert predicted(one, first["stage"])[group] < 0.85 * first["sent"][group] - NOTHING
    counted = replace(one, length=1, micro_batch=one.tokens)
    work = micro_batch_work(counted, ModelWeights(one.model, one.lora), first["stage"])
    assert work.flops * one.micro_batches < 0.9 * first["flops"]


def test_the_time_of_a_step_is_work_over_rate_and_bytes_over_links() -> None:
    one, of = job(layers=4, pp=2, micro_batches=4, dtype="bfloat16"), card("h100", tflops=100.0, gbps=80.0)
    sums = ModelWeights(one.model, one.lora)
    works = [micro_batch_work(one, sums, rank) for rank in (0, 1)]
    slowest = max(work.flops / 100e12 + work.pipeline / 10e9 for work in works)
    found = estimate(one, one, sums, of)
    assert found.seconds == pytest.approx(slowest * 4 * (1 + 1 / 4))
    assert found.seconds == pytest.approx(found.compute + found.messages)
    assert found.rate == pytest.approx(2 * 128 * 4 / found.seconds / 2)


def test_interleaving_shortens_the_bubble_and_more_micro_batches_do() -> None:
    assert bubble(job(layers=4, pp=2, micro_batches=4)) == 1 / 4
    assert bubble(job(layers=4, pp=2, chunk=1, micro_batches=4)) == 1 / 8
    assert bubble(job(layers=4, pp=2, micro_batches=8)) == 1 / 8
    assert bubble(job()) == 0
