"""torchrun with a readable end: same options, but the failing rank's own message stays last, and its exit status.

torchrun itself ends every failure with its own report and status 1, under which one clear line of ours is lost.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def status_of(exitcode: int) -> int:
    """A process's exit code as a shell status: killed by signal N is 128 + N."""
    return exitcode if exitcode >= 0 else 128 - exitcode


def children() -> list[int]:
    """Process ids of this process's children: the ranks."""
    own = Path("/proc/self/task").glob("*/children")
    return [int(word) for file in own for word in file.read_text(encoding="ascii").split()]


def pass_on(number: int, frame: FrameType | None) -> None:
    """Hand a stop signal to the ranks and go on waiting: training saves at the step's end and exits 0.

    torchrun would give them 30 seconds and then kill them, in the middle of a large checkpoint if need be.
    """
    for child in children():
        os.kill(child, number)


def cause(failures: dict[int, Any]) -> tuple[int, Any]:
    """(rank, failure) of the rank that began it: the others lose their connection and fail within the same second.

    Args:
        failures: torchrun's records by rank, each with `exitcode` and `timestamp`.
    """
    return min(
        ((one.global_rank(), one) if hasattr(one, "global_rank") else (rank, one) for rank, one in failures.items()),
        # status 1 may be a lost connection, and SIGTERM is how the launcher itself ends the others
        key=lambda pair: ({1: 1, -signal.SIGTERM: 2}.get(pair[1].exitcode, 0), pair[1].timestamp, pair[0]),
    )


def main(argv: list[str]) -> int:
    """Launch as `torchrun argv` does; returns 0 or the status of the rank that failed first."""
    from torch.distributed.elastic.agent.server.api import logger as agent_logger
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # "failed (exitcode: 2)", "sending SIGTERM": what they say is said below, or by the ranks themselves.
    for name in {agent_logger.name, "torch.distributed.elastic.multiprocessing.api"}:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options = parse_args(argv)
    if hasattr(options, "signals_to_handle"):  # newer torch; older ones always stop at SIGTERM
        options.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    try:
        run(options)
    except ChildFailedError as error:
        rank, failure = cause(error.failures)
        if failure.exitcode > 2:  # 1 and 2 are ours, and have been explained by the rank
            print(f"launch: rank {rank} ended with exit status {failure.exitcode}", file=sys.stderr)
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            hint = ", often for want of memory" if name == "SIGKILL" else ""
            print(f"launch: rank {rank} was ended by {name}{hint}", file=sys.stderr)
        return status_of(failure.exitcode)
    except SignalException as error:
        print(f"launch: stopped by {signal.Signals(error.sigval).name}", file=sys.stderr)
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
