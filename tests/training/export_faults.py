"""Faults planted into `--save-safetensors`: kills and lost tensors. Each is a context manager."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.training.faults import replaced


def _in_call(call: int, act: Callable[..., Any], owner: Any, name: str) -> Any:
    """`act(original, *arguments)` instead of the `call`-th call of `owner.name` in this process."""
    seen = [0]

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **more: Any) -> Any:
            seen[0] += 1
            return act(original, *arguments, **more) if seen[0] == call else original(*arguments, **more)

        return called

    return replaced(owner, name, make)


def _die(*arguments: Any, **more: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_between_tensors() -> Any:
    """SIGKILL in the second checkpoint, with half of its HF folder written."""
    from mindspeed_llm.checkpoint.formats.hf import HfFiles

    return _in_call(31 + 15, _die, HfFiles, "write")


def killed_in_the_adapter() -> Any:
    """SIGKILL in the second checkpoint, before its PEFT folder is complete."""
    from mindspeed_llm.checkpoint.adapters import export

    return _in_call(2, _die, export, "write_text")


@contextmanager
def written_behind_step_3() -> Iterator[None]:
    """What another thread writes of an HF folder waits until this process has done its third step."""
    from mindspeed_llm.checkpoint.formats.hf import HfFiles
    from mindspeed_llm.training import loop

    done = threading.Semaphore(0)
    third = threading.Event()

    def counting(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*arguments: Any) -> Any:
            result = train_step(*arguments)
            done.release()
            return result

        return stepped

    def waiting(write: Callable[..., int]) -> Callable[..., int]:
        def late(*arguments: Any) -> int:
            if threading.current_thread() is not threading.main_thread() and not third.is_set():
                for _ in range(3):
                    assert done.acquire(timeout=100), "the third step does not come"
                third.set()
            return write(*arguments)

        return late

    with replaced(loop, "train_step", counting), replaced(HfFiles, "write", waiting):
        yield


def the_live_model_is_read_late() -> Any:
    """The HF folder is written from the live model's own memory, as if nothing had been copied."""
    from mindspeed_llm.training import export

    def make(kept: Any) -> Any:
        def forgetful(self: Any, chunks: Any, model: Any, copies: Any = None) -> None:
            kept(self, chunks, model, None)

        return forgetful

    both = ExitStack()
    both.enter_context(written_behind_step_3())
    both.enter_context(replaced(export.LiveShares, "__init__", make))
    return both


def a_tensor_left_out() -> Any:
    """Rank 0 loses its third tensor."""
    from mindspeed_llm.checkpoint.formats.hf import HfFiles

    return _in_call(3 if os.environ["RANK"] == "0" else -1, lambda *arguments: 0, HfFiles, "write")


def a_tensor_written_twice() -> Any:
    """Rank 3 writes its third tensor again."""
    from mindspeed_llm.checkpoint.formats.hf import HfFiles

    def twice(write: Callable[..., int], *arguments: Any) -> int:
        return write(*arguments) + write(*arguments)

    return _in_call(3 if os.environ["RANK"] == "3" else -1, twice, HfFiles, "write")
