"""torchrun with a readable end: same options, but the failing rank's own message stays last, and its exit status.

torchrun itself ends every failure with its own report and status 1, under which one clear line of ours is lost.
"""

import contextlib
import logging
import signal
import sys


def status_of(exitcode: int) -> int:
    """A process's exit code as a shell status: killed by signal N is 128 + N."""
    return exitcode if exitcode >= 0 else 128 - exitcode


def main(argv: list[str]) -> int:
    """Launch as `torchrun argv` does; returns 0 or the status of the rank that failed first."""
    from torch.distributed.elastic.agent.server.api import logger as agent_logger
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # "failed (exitcode: 2)", "sending SIGTERM": what they say is said below, or by the ranks themselves.
    for name in {agent_logger.name, "torch.distributed.elastic.multiprocessing.api"}:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # A scheduler's SIGUSR1 is for the ranks, which save and stop; it must not end their launcher.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
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
