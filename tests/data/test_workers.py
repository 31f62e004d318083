"""The processes that tokenise: their results in order, and none left when the work is given up."""

import os
import signal
import time
from multiprocessing import active_children
from pathlib import Path

import pytest

from mindspeed_llm.data.workers import in_order
from mindspeed_llm.errors import InputError


def doubled(wait: float, chunk: list[int]) -> tuple[int, list[int]]:
    """The chunk doubled and this process, after a wait for all chunks but the first."""
    if chunk[0]:
        time.sleep(wait)
    return os.getpid(), [2 * value for value in chunk]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_chunks(workers: int) -> None:
    chunks = [[n, n + 1] for n in range(40)]
    made = list(in_order(doubled, 0.001, iter(chunks), workers))
    assert [values for _, values in made] == [[2 * n, 2 * n + 2] for n in range(40)]
    assert {process for process, _ in made} & {os.getpid()} == ({os.getpid()} if workers == 1 else set())


@pytest.mark.parametrize("killed", [False, True], ids=["given up", "workers killed"])
def test_work_that_is_given_up_ends_its_processes_without_waiting_for_their_chunks(killed: bool) -> None:
    before = set(active_children())
    chunks = iter([[0]] + [[n] * 300_000 for n in range(1, 9)])  # more than a pipe between processes holds
    made = in_order(doubled, 120.0, chunks, 2)
    process, _ = next(made)
    begin = time.monotonic()
    if killed:
        os.kill(process, signal.SIGKILL)
        with pytest.raises(InputError, match="has been killed.*give fewer --workers"):
            next(made)
    made.close()
    assert time.monotonic() - begin < 60 and not set(active_children()) - before


def long_answer(directory: Path, chunk: int) -> tuple[int, bytes]:
    """More than a connection between processes holds, and a note that it is about to be sent."""
    (directory / str(chunk)).touch()
    return os.getpid(), bytes(10_000_000)


def test_a_process_that_is_killed_while_it_sends_is_noticed(tmp_path: Path) -> None:
    before = set(active_children())
    made = in_order(long_answer, tmp_path, iter(range(1, 9)), 2)
    process, _ = next(made)
    while not (tmp_path / "3").exists():  # the next one of the same process
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(InputError, match="has been killed"):
        next(made)  # of the other process, perhaps
        next(made)
    assert not set(active_children()) - before


def failing(message: str, chunk: int) -> int:
    """The chunk, and an error at the third."""
    if chunk == 3 and message == "lambda":
        raise ValueError(lambda: 3)  # which cannot travel between processes
    if chunk == 3:
        raise InputError(message) if message else KeyError(chunk)
    return chunk


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("message", "error"), [("row 3 is bad", InputError), ("", KeyError), ("lambda", (ValueError, RuntimeError))]
)
def test_an_error_comes_back_in_its_turn_as_it_was_raised(
    message: str, error: type[Exception] | tuple[type[Exception], ...], workers: int
) -> None:
    made = in_order(failing, message, iter(range(1, 9)), workers)
    assert [next(made), next(made)] == [1, 2]
    with pytest.raises(error, match=message or "3"):
        next(made)
