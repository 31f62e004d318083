"""What every test shares: where the recorded references lie, and a loud skip where they do not; turns; ports."""

import gc
import os
import socket
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.turns import Turns

# Threads of several processes that share the cores wait for each other in busy loops: a reference that one thread
# computes in half a second took fifteen.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPO = Path(__file__).resolve().parents[1]
TURNS = pytest.StashKey[Turns]()


def pytest_configure(config: pytest.Config) -> None:
    """Take turns with the other processes of this test run, where there are any."""
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        config.stash[TURNS] = Turns(worker["testrunuid"])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave the turns."""
    if TURNS in config.stash:
        config.stash[TURNS].close()


def pytest_collection_finish() -> None:
    """Set modules and collected tests aside: no search for cycles goes through them again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked `alone` waits for those in other processes, and they for it; no time limit includes that."""
    turns = item.config.stash.get(TURNS, None)
    if turns is None:
        return (yield)
    with turns.turn(item.get_closest_marker("alone") is not None):
        return (yield)


def unsynced(descriptor: int) -> None:
    """In place of `os.fsync`, which may take most of a short test's time.

    Tests kill processes, which loses nothing that was written; only a power cut would. Programs that are started by
    their command line do wait for the disk.
    """


@pytest.fixture(autouse=True, scope="session")
def _unsynced() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(os, "fsync", unsynced)
        yield


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def shared_dir() -> Path:
    """The folder of recorded references beside the checkout; skips the test, saying so, where it is absent."""
    path = REPO.parent / "shared"
    if not (path / "golden").is_dir():
        pytest.skip(f"needs the recorded references in {path}, which a plain clone does not have")
    return path


@pytest.fixture
def golden() -> Path:
    """The folder of golden cases, tokenizers and tiny HF checkpoints."""
    return shared_dir() / "golden"
