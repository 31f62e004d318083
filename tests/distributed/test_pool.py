"""The process pools themselves: a failure shows what every process was doing, and nothing is left behind."""

import os
import time
from collections.abc import Iterator

import pytest

from tests.distributed import pool as pools
from tests.distributed.pool import Pool, pool


def nothing(rank: int) -> None:
    """Processes that need no engine start in a moment."""


def answer(rank: int, add: int) -> int:
    return rank + add


def hash_of(rank: int, text: str) -> int:
    return hash(text)


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("a planted error on the second process")
    wait_for_ever()


def fail_on_all(rank: int) -> None:
    raise KeyError(f"planted on {rank}")


def wait_for_ever() -> None:
    while True:
        time.sleep(0.05)


def hang(rank: int) -> None:
    wait_for_ever()


def die_on_one(rank: int) -> None:
    if rank == 0:
        os._exit(7)


@pytest.fixture
def light() -> Iterator[Pool]:
    two = Pool(2, prepare=nothing, bare=True)
    two.run(answer, add=0)  # both have started: no timeout below includes that
    yield two
    for process in two.processes:
        process.kill()


def test_results_come_by_rank(light: Pool) -> None:
    assert light.run(answer, add=5) == [5, 6]
    assert light.run("tests.distributed.test_pool:answer", add=1) == [1, 2]


def test_ranks_hash_strings_with_seeds_of_their_own() -> None:
    """So that an order that depends on a set differs between them here as it does under a launcher."""
    if os.environ.get("PYTHONHASHSEED", "random") != "random":
        pytest.skip("PYTHONHASHSEED is set")
    assert len(set(pool(2).run(hash_of, text="linear_qkv"))) == 2


def test_a_crash_shows_every_traceback(light: Pool) -> None:
    with pytest.raises(AssertionError) as error:
        light.run(fail_on_all)
    assert "fail_on_all failed on 2 processes" in str(error.value)
    for rank in (0, 1):
        assert f"--- rank {rank} ---\nTraceback" in str(error.value)
        assert f"planted on {rank}" in str(error.value)


def test_a_crash_shows_where_the_processes_that_wait_for_it_stand(light: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "GRACE", 0.2)
    with pytest.raises(AssertionError) as error:
        light.run(fail_on_one)
    first, second = str(error.value).split("--- rank 1 ---")
    assert "a planted error on the second process" in second
    assert "no answer" in first
    assert "wait_for_ever" in first


def test_a_hung_process_is_shown_and_ended(light: Pool) -> None:
    with pytest.raises(AssertionError, match="(?s)no answer.*wait_for_ever.*rank 1.*wait_for_ever"):
        light.run(hang, timeout=0.5)
    assert not any(process.is_alive() for process in light.processes)


def test_a_process_that_dies_is_named_with_its_exit_code(light: Pool) -> None:
    with pytest.raises(AssertionError, match=r"--- rank 0 ---\nthe process died with exit code 7"):
        light.run(die_on_one)


def test_one_pool_per_world_size_is_kept_until_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_pools", {})
    monkeypatch.setattr(pools, "Pool", lambda size: Pool(size, prepare=nothing, bare=True))
    two, one = pool(2), pool(1)
    assert two.run(answer, add=0) == [0, 1]
    assert pool(2) is two and 1 << 20 < two.resident() < pools.LARGEST
    with pytest.raises(AssertionError):
        two.run(fail_on_all)
    assert not any(process.is_alive() for process in two.processes)
    assert pool(2) is not two
    assert pool(1) is one
    pools.close_pools()
    assert not any(process.is_alive() for process in one.processes)


def test_a_pool_that_has_grown_large_is_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_pools", {})
    monkeypatch.setattr(pools, "Pool", lambda size: Pool(size, prepare=nothing, bare=True))
    monkeypatch.setattr(pools, "LARGEST", 1 << 20)
    one = pool(1)
    assert one.run(answer, add=0) == [0]
    assert pool(1) is not one and not one.processes[0].is_alive()
    assert pool(1).run(answer, add=3) == [3]
    pools.close_pools()
