"""Runs of preprocessing that are killed at a chosen moment of a chosen phase, each in a process of its own.

Used as `python killing.py`: reads `{"trials": [{"argv": [...], "phase": name or null, "share": 0..1}]}` from standard
input and prints what became of each trial. Processes are forked from this one, which has imported everything and done
nothing yet, so that a trial costs no start-up.

A moment is a call of a Python function while the phase is under way: the trial first counts them, then kills itself by
SIGKILL at the given share of them.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data import complete, preprocess, publish, row_files, shards, tokenize_rows  # noqa: F401
from mindspeed_llm.errors import InputError
from tests.conftest import unsynced

# phase -> the functions that do it, as (module or class, name)
PHASES: dict[str, list[tuple[Any, str]]] = {
    "tokenising": [(preprocess, "write_rows"), (shards, "write_rows")],
    "merging": [(shards, "concatenate"), (shards, "hash_rows")],
    "dividing": [(complete, "divide"), (complete, "copy_rows")],
    "packing": [(complete, "pack_files")],
    "publishing": [(publish.Aside, "publish"), (preprocess, "remove_shards")],
}


class Moment:
    """Counts the calls of Python functions within a phase, and kills the process at one of them."""

    def __init__(self, phase: str, at: int | None) -> None:
        """Args: at: the call to die at; None only counts."""
        self.at, self.calls = at, 0
        for owner, name in PHASES[phase]:
            setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            sys.setprofile(self._count)
            try:
                return work(*args, **kwargs)
            finally:
                sys.setprofile(None)

        return watched

    def _count(self, frame: object, event: str, argument: object) -> None:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def in_a_process(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked process, as JSON; None when that is killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = json.dumps(work()).encode()
            os.write(writing, answer)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else None


def run(argv: list[str]) -> dict[str, Any]:
    """A whole run: the parts it made (their first rows), and its error."""
    made: list[int] = []
    write = shards.write_rows
    shards.write_rows = lambda plan, folder, begin, end: made.append(begin) or write(plan, folder, begin, end)  # type: ignore[assignment]
    try:
        preprocess.preprocess(parse(PreprocessOptions, argv, "preprocess_data.py"))
    except InputError as error:
        return {"error": str(error), "made": made}
    except BaseException as error:  # a defect, which the test has to see
        return {"error": repr(error), "made": made}
    return {"error": None, "made": made}


def counted(argv: list[str], phase: str) -> int:
    """Calls within a phase of a run that is not killed."""
    moment = Moment(phase, None)
    answer = run(argv)
    assert answer["error"] is None, answer
    return moment.calls


def killed(argv: list[str], phase: str, at: int) -> dict[str, Any]:
    """A run that dies at a call of a phase."""
    Moment(phase, at)
    return run(argv)


def main() -> None:
    """Do the trials of standard input in their order, and print the answers."""
    os.fsync = unsynced
    calls: dict[str, int] = {}
    answers = []
    for trial in json.load(sys.stdin)["trials"]:
        argv, phase = trial["argv"], trial["phase"]
        if phase is None:
            answers.append(in_a_process(lambda argv=argv: run(argv)))
            continue
        key = json.dumps([trial["count_argv"], phase])
        if key not in calls:
            calls[key] = in_a_process(lambda argv=trial["count_argv"], phase=phase: counted(argv, phase))
        at = 1 + int(trial["share"] * (calls[key] - 1))
        answers.append(in_a_process(lambda argv=argv, phase=phase, at=at: killed(argv, phase, at)))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
