"""Events planted into a run by the tests: signals, kills, broken numbers. Each is a context manager."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` replaced by `make(original)` for a while."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def _signal_in_step(number: signal.Signals, step: int, rank: int = 0) -> Iterator[None]:
    """This process gets a real signal in the middle of its `step`-th step."""
    from mindspeed_llm.training import loop

    seen = [0]

    def make(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any) -> Any:
            seen[0] += 1
            if seen[0] == step and int(os.environ["RANK"]) == rank:
                os.kill(os.getpid(), number)
            return train_step(*args)

        return stepped

    with replaced(loop, "train_step", make):
        yield


def terminated_in_step_3() -> Any:
    """SIGTERM on rank 0."""
    return _signal_in_step(signal.SIGTERM, 3)


def usr1_in_step_3_of_rank_1() -> Any:
    """SIGUSR1 on rank 1 alone, as when a scheduler warns one node."""
    return _signal_in_step(signal.SIGUSR1, 3, rank=1)


@contextlib.contextmanager
def killed_writing(call: int) -> Iterator[None]:
    """SIGKILL when a rank's file is written for the `call`-th time, after half of it."""
    from mindspeed_llm.training import checkpointing

    seen = [0]

    def make(write: Callable[..., Any]) -> Callable[..., Any]:
        def half(path: Any, content: Any) -> None:
            seen[0] += 1
            write(path, content)
            if seen[0] == call:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return half

    with replaced(checkpointing, "write_torch_file", make):
        yield


@contextlib.contextmanager
def killed_before_tracker(call: int) -> Iterator[None]:
    """SIGKILL between the publication of the `call`-th checkpoint and its tracker."""
    from mindspeed_llm.training import checkpointing

    seen = [0]

    def make(write: Callable[..., Any]) -> Callable[..., Any]:
        def kill(*args: Any) -> None:
            seen[0] += 1
            if seen[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*args)

        return kill

    with replaced(checkpointing, "write_tracker", make):
        yield
