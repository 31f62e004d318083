"""posttrain_gpt.py with a rank that dies in a step of its first attempt, for launchers: see `test_restart`.

DYING_RANK, DYING_STEP and DYING_BY (KILL, or an exit status) say which, when and how.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

from mindspeed_llm.cli import run
from mindspeed_llm.training.posttrain import main


def dying(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """A training step that ends the process when its number has come."""
    seen = [0]

    def stepped(*arguments: Any) -> Any:
        seen[0] += 1
        if seen[0] == int(os.environ["DYING_STEP"]):
            if os.environ["DYING_BY"] == "KILL":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(int(os.environ["DYING_BY"]))
        return train_step(*arguments)

    return stepped


def planted(argv: list[str]) -> int:
    """`posttrain.main` with the fault in it."""
    from mindspeed_llm import device

    device.select("cpu")
    from mindspeed_llm.training import loop

    if os.environ["RANK"] == os.environ["DYING_RANK"] and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        loop.train_step = dying(loop.train_step)
    return main(argv)


if __name__ == "__main__":
    run(planted)
