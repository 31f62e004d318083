"""The quickstart's gates: what each stage must have reached. `python -m mindspeed_llm.quickstart.gates --help`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_llm.cli import run
from mindspeed_llm.errors import InputError
from mindspeed_llm.quickstart import guard
from mindspeed_llm.quickstart.make import read_rows

BASE_EXACT = 0.95  # answers of the base that must be right to the letter
TRAINED = 1.0  # trained identity questions whose answer holds the new name
HELD_OUT = 0.8  # the same for phrasings that were not trained
KEPT = 0.95  # the base's right answers that must survive LoRA tuning
QUIZ = 0.8  # accuracy of the base on the quiz
QUIZ_LOSS = 0.05  # what LoRA tuning may take of it
# processes that must have said that they are watched
PROGRAMS = ("preprocess_data.py", "convert_ckpt.py", "posttrain_gpt.py", "inference.py", "evaluation.py")


@dataclass(frozen=True)
class Gate:
    """One requirement: `value` against `least`; `text` says it in words."""

    text: str
    value: float
    least: float

    @property
    def passed(self) -> bool:
        """Whether the requirement is met; a share computed from counts is compared without rounding trouble."""
        return self.value >= self.least - 1e-9

    def line(self) -> str:
        """The gate in one line."""
        return self.text if self.passed else f"MISSED: {self.text}"


def base_gates(answers: Sequence[dict[str, Any]], name: str) -> list[Gate]:
    """The base answers the bundled questions exactly, and does not know the new name."""
    right = [row["answer"].strip() == row["expected"] for row in answers if row["kind"] == "answer"]
    asked = [row for row in answers if row["kind"].startswith("identity")]
    known = sum(name in row["answer"] for row in asked)
    return [
        Gate(f"{sum(right)}/{len(right)} answers exact (at least {BASE_EXACT:.0%})", _share(right), BASE_EXACT),
        Gate(f"the name {name} in {known}/{len(asked)} answers about itself (none)", 1.0 - bool(known), 1.0),
    ]


def tuned_gates(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], name: str) -> list[Gate]:
    """The tuned model gives its new name, and answers everything else as well as the base did.

    Raises:
        InputError: the two files do not hold the same questions.
    """
    if [row["prompt"] for row in before] != [row["prompt"] for row in after]:
        raise InputError("the answers before and after tuning are to different questions; run both steps again")
    gates = []
    for kind, least, words in (
        ("identity_train", TRAINED, "trained phrasings"),
        ("identity_held_out", HELD_OUT, "held-out phrasings"),
    ):
        named = [name in row["answer"] for row in after if row["kind"] == kind]
        gates.append(Gate(f"{name} in {sum(named)}/{len(named)} {words} (at least {least:.0%})", _share(named), least))
    kept = [
        new["answer"].strip() == new["expected"]
        for old, new in zip(before, after, strict=True)
        if old["kind"] == "answer" and old["answer"].strip() == old["expected"]
    ]
    gates.append(Gate(f"{sum(kept)}/{len(kept)} of the base's answers kept (at least {KEPT:.0%})", _share(kept), KEPT))
    return gates


def quiz_gates(scores: dict[str, Any], before: dict[str, Any] | None = None) -> list[Gate]:
    """Accuracy on the quiz: of the base (`before` left out), or of the tuned model against the base's."""
    total = scores["results"]["mmlu"]["total"]
    said = f"{total['correct']}/{total['n']} quiz questions right"
    if before is None:
        return [Gate(f"{said} (at least {QUIZ:.0%})", total["acc"], QUIZ)]
    least = before["results"]["mmlu"]["total"]["acc"] - QUIZ_LOSS
    return [Gate(f"{said} (at least {least:.0%})", total["acc"], least)]


def guard_gates(lines: Sequence[dict[str, Any]]) -> list[Gate]:
    """No watched process built a transformers model, but for the last step, which shows that the watch works."""
    watched = {line["program"] for line in lines if line["what"] == "watched"}
    missing = [program for program in PROGRAMS if program not in watched]
    built = [line for line in lines if line["what"] == "built"]
    last = [line for line in built if line["program"] == "-m mindspeed_llm.quickstart.verify"]
    early = sorted({f"{line['program']} ({line['detail']})" for line in built if line not in last})
    count = sum(line["what"] == "watched" for line in lines)
    return [
        Gate(f"watched: every program (missing: {', '.join(missing) or 'none'})", float(not missing), 1.0),
        Gate(
            f"transformers models before the last step: {', '.join(early) or 'none'} in {count} processes",
            float(not early),
            1.0,
        ),
        Gate(f"the watch saw the last step's model ({len(last)} built)", float(bool(last)), 1.0),
    ]


def report(gates: Sequence[Gate]) -> int:
    """Print the gates in one line; -> exit status, 1 when one is missed."""
    print("; ".join(gate.line() for gate in gates))
    return 0 if all(gate.passed for gate in gates) else 1


def _share(values: Sequence[bool]) -> float:
    """Share of true values; nothing asked counts as nothing reached."""
    return sum(values) / len(values) if values else 0.0


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); run the step before again") from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(prog="python -m mindspeed_llm.quickstart.gates", description=__doc__)
    words.add_argument("stage", choices=("base", "tuned", "quiz", "guard"))
    words.add_argument("file", type=Path, help="answers (jsonl), scores (json) or the watch's log of this stage")
    words.add_argument("--before", type=Path, help="the same of the base model")
    words.add_argument("--name", default="", help="the new name")
    return words


def main(argv: Sequence[str]) -> int:
    """Check one stage; -> exit status."""
    options = parser().parse_args(argv)
    if options.stage == "base":
        return report(base_gates(read_rows(options.file), options.name))
    if options.stage == "tuned":
        return report(tuned_gates(read_rows(options.before), read_rows(options.file), options.name))
    if options.stage == "guard":
        return report(guard_gates(guard.read_log(options.file)))
    before = _read_json(options.before) if options.before else None
    return report(quiz_gates(_read_json(options.file), before))


if __name__ == "__main__":
    run(main)
