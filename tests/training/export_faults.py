"""Faults planted into `--save-safetensors`: kills and lost tensors. Each is a context manager."""

import os
import signal
from collections.abc import Callable
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
