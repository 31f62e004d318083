"""From a script's `main` to its exit status: what an engineer sees when a command cannot be carried out."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from mindspeed_llm.arguments.parser import CommandLineError
from mindspeed_llm.errors import InputError, UsageError

# Conditions of the machine that a user can change; any other OSError is more likely a defect and keeps its traceback.
MACHINE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.EADDRINUSE, errno.EMFILE, errno.ENAMETOOLONG,
}  # fmt: skip

GRACE_SECONDS = 1.0
"""How long other ranks let rank 0 speak first; a launcher notices a failed process within 0.1 s."""


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call `main` with the command line's words and exit with its status.

    Exit status: 0 done; 1 an input or the machine does not fit; 2 the options are wrong; 130 interrupted. These print
    one line on standard error; anything else is a defect and keeps its traceback. Under torchrun what fails on every
    rank is reported by rank 0 alone, what fails on some ranks by those.
    """
    try:
        status = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except UsageError as error:
        status = 2
        if not isinstance(error, CommandLineError) or _rank() == 0:
            _say(str(error))
    except InputError as error:
        status = 1
        _say(str(error))
    except KeyboardInterrupt:
        status = 130
        _say("interrupted")
    except BrokenPipeError:
        # The reader of our output has gone, as in `script --help | head`; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        status = 1
        _say(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror))
    sys.exit(status)


def _rank() -> int:
    """This process's number in the launch, 0 outside one."""
    return int(os.environ.get("RANK", "0"))


def _say(message: str) -> None:
    """One line on standard error, naming the script and, in a launch of several processes, the rank."""
    script = os.path.basename(sys.argv[0])
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and _rank() != 0:
        # Where rank 0 has failed too, most likely by the same error, the launcher ends this process meanwhile.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE_SECONDS)
    rank = f" [rank {_rank()}]" if launched else ""
    # One write, so that the lines of several ranks do not run into each other.
    sys.stderr.write(f"{script}:{rank} error: {' '.join(message.split())}\n")
    sys.stderr.flush()
