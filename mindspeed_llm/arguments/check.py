"""Read a command line and do nothing else: `python -m mindspeed_llm.arguments.check posttrain_gpt.py --lr 1e-4`.

Launchers call it first, so that a mistyped option is one line and exit status 2, not a report from every process.
"""

import contextlib
import io

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.programs import PROGRAMS
from mindspeed_llm.cli import run
from mindspeed_llm.errors import UsageError, lookup


def main(argv: list[str]) -> int:
    """Parse the options after the script's name; 0 when they are right.

    Raises UsageError otherwise. The note about options that need nothing is left to the run itself.
    """
    if not argv:
        raise UsageError(f"give a script and its options; scripts: {', '.join(PROGRAMS)}")
    program = lookup("script", argv[0], PROGRAMS)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parse(program, argv[1:], argv[0])
    except UsageError as error:
        raise UsageError(f"{argv[0]}: {error}") from error
    return 0


if __name__ == "__main__":
    run(main)
