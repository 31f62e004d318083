"""The time of a step from its work and its messages, and the bubble of a pipeline."""

import pytest

from mindspeed_llm.device.cards import card
from mindspeed_llm.planning.estimate import estimate
from mindspeed_llm.planning.schedule import bubble
from mindspeed_llm.planning.traffic import micro_batch_work
from mindspeed_llm.planning.weights import ModelWeights
from tests.planning.jobs import job


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
