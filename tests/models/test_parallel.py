"""Process groups: what is refused, and a program without a launcher."""

from collections.abc import Iterator

import numpy
import pytest

from mindspeed_llm import device
from tests.distributed.pool import Pool, pool

pytestmark = pytest.mark.distributed


def choose_device(rank: int) -> None:
    """A process that has not joined any group."""
    device.select("cpu")


@pytest.fixture(scope="module")
def lone() -> Iterator[Pool]:
    one = Pool(1, prepare=choose_device)
    yield one
    one.close()


def test_a_taken_port_is_one_line_that_names_the_address_and_the_remedy(lone: Pool) -> None:
    message = lone.run("tests.models.worker:connect_to_a_taken_port")[0]
    assert message.startswith("cannot meet at 127.0.0.1:")
    assert message.endswith("set MASTER_PORT to a free port")


def test_a_program_started_alone_is_a_job_of_one_and_leaves_no_group(lone: Pool) -> None:
    assert lone.run("tests.models.worker:connect_alone") == [(1, False)]


@pytest.mark.parametrize(("tensor", "pipeline"), [(3, 1), (1, 3), (2, 2)])
def test_a_layout_that_does_not_fit_the_processes_is_refused_with_both_sizes(tensor: int, pipeline: int) -> None:
    for message in pool(2).run("tests.models.worker:start_message", tensor=tensor, pipeline=pipeline):
        assert message.startswith(f"2 processes cannot hold tensor-model-parallel-size {tensor} x pipeline")
        assert f"start a multiple of {tensor * pipeline}" in message


def test_another_layout_can_follow_in_the_same_processes() -> None:
    for tensor, pipeline in ((2, 1), (1, 2), (1, 1)):
        assert pool(2).run("tests.models.worker:start_message", tensor=tensor, pipeline=pipeline) == ["started"] * 2


@pytest.mark.parametrize(("tensor", "vocabulary"), [(1, 8), (1, 7), (2, 7), (2, 8), (2, 3), (2, 0)])
def test_padding_rows_of_the_vocabulary_never_win(tensor: int, vocabulary: int) -> None:
    logits = numpy.random.default_rng(0).standard_normal((5, 8)).astype(numpy.float32)
    arguments = {"tensor": tensor, "logits": logits, "vocabulary": vocabulary}
    found = numpy.concatenate(pool(tensor).run("tests.models.worker:masked", **arguments), axis=-1)
    expected = logits.copy()
    if vocabulary:  # 0: the model does not say, and nothing is masked
        expected[:, vocabulary:] = numpy.finfo(numpy.float32).min
    assert numpy.array_equal(found, expected)
