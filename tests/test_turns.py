"""Turns of test processes: those that share the machine, and one that has it for itself."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from uuid import uuid4

import pytest

from tests.turns import Turns


@pytest.fixture
def three() -> Iterator[list[Turns]]:
    name = uuid4().hex
    turns = [Turns(name) for _ in range(3)]
    yield turns
    for one in turns:
        one.close()
    assert not any(path.exists() for path in turns[0].paths)


def begun(turns: Turns, alone: bool) -> tuple[threading.Thread, threading.Event, threading.Event]:
    """A test in a thread of its own: what says that it runs, and what ends it."""
    runs, end = threading.Event(), threading.Event()

    def test() -> None:
        with turns.turn(alone):
            runs.set()
            end.wait(30)

    thread = threading.Thread(target=test)
    thread.start()
    return thread, runs, end


def test_a_test_alone_waits_for_the_others_and_those_behind_it_wait_for_it(three: list[Turns]) -> None:
    with ExitStack() as ended:
        shared = [begun(one, False) for one in three[:2]]
        assert all(runs.wait(10) for _, runs, _ in shared), "two tests run side by side"
        alone = begun(three[2], True)
        shared[0][2].set()
        shared[0][0].join()
        time.sleep(0.1)
        late = begun(three[0], False)
        assert not alone[1].wait(0.3), "one of the two is still under way"
        assert not late[1].is_set(), "who comes later does not overtake the one that waits to be alone"
        shared[1][2].set()
        assert alone[1].wait(10) and not late[1].wait(0.3)
        alone[2].set()
        assert late[1].wait(10)
        late[2].set()
        for thread, _, _ in (*shared, alone, late):
            ended.callback(thread.join)
