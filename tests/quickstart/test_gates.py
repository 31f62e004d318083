"""The gates: what passes, what is missed, and that a missed one ends with exit status 1."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mindspeed_llm.errors import InputError
from mindspeed_llm.quickstart import guard
from mindspeed_llm.quickstart.gates import PROGRAMS, base_gates, guard_gates, main, quiz_gates, tuned_gates
from mindspeed_llm.quickstart.make import make_prompts, read_rows, write_rows
from mindspeed_llm.quickstart.show import chosen
from mindspeed_llm.quickstart.verify import differences

REPO = Path(__file__).resolve().parents[2]
NAME = "Zorvex"


def answers(wrong: int = 0, named: dict[str, int] | None = None) -> list[dict[str, Any]]:
    """100 questions, `wrong` of them answered wrongly, and per identity kind the number answered with the name."""
    rows = [
        {"kind": "answer", "prompt": f"q{i}", "expected": f"a{i}", "answer": "?" if i < wrong else f"a{i}"}
        for i in range(100)
    ]
    for kind, count in (("identity_train", 20), ("identity_held_out", 10)):
        for i in range(count):
            text = f"I am {NAME}." if i < (named or {}).get(kind, 0) else "I have no name."
            rows.append({"kind": kind, "prompt": f"{kind}{i}", "expected": "I have no name.", "answer": text})
    return rows


def passed(gates: list[Any]) -> list[bool]:
    """Whether each gate is met."""
    return [gate.passed for gate in gates]


@pytest.mark.parametrize(("wrong", "met"), [(0, True), (5, True), (6, False)])
def test_the_base_must_answer_ninety_five_of_a_hundred_exactly(wrong: int, met: bool) -> None:
    assert passed(base_gates(answers(wrong), NAME)) == [met, True]


def test_a_base_that_knows_the_name_already_is_refused() -> None:
    assert passed(base_gates(answers(named={"identity_held_out": 1}), NAME)) == [True, False]


@pytest.mark.parametrize(
    ("trained", "held_out", "wrong", "met"),
    [
        (20, 8, 0, [True, True, True]),
        (19, 10, 0, [False, True, True]),
        (20, 7, 0, [True, False, True]),
        (20, 10, 5, [True, True, True]),
        (20, 10, 6, [True, True, False]),
        (0, 0, 0, [False, False, True]),
    ],
)
def test_the_tuned_model_must_know_its_name_and_keep_the_other_answers(
    trained: int, held_out: int, wrong: int, met: list[bool]
) -> None:
    after = answers(wrong, {"identity_train": trained, "identity_held_out": held_out})
    assert passed(tuned_gates(answers(), after, NAME)) == met


def test_only_answers_the_base_had_right_count_as_lost() -> None:
    named = {"identity_train": 20, "identity_held_out": 10}
    assert passed(tuned_gates(answers(5), answers(5, named), NAME)) == [True, True, True]


def test_answers_to_other_questions_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="different questions"):
        tuned_gates(answers(), answers()[1:], NAME)


def scores(correct: int) -> dict[str, Any]:
    """evaluation.py's file for 40 questions."""
    return {"results": {"mmlu": {"total": {"n": 40, "correct": correct, "acc": correct / 40}}}}


@pytest.mark.parametrize(("correct", "met"), [(32, True), (31, False)])
def test_the_base_must_have_eighty_percent_of_the_quiz(correct: int, met: bool) -> None:
    assert passed(quiz_gates(scores(correct))) == [met]


@pytest.mark.parametrize(("after", "met"), [(40, True), (38, True), (37, False)])
def test_tuning_may_take_five_points_of_the_quiz(after: int, met: bool) -> None:
    assert passed(quiz_gates(scores(after), scores(40))) == [met]


@pytest.mark.parametrize(("wrong", "status"), [(0, 0), (6, 1)])
def test_a_missed_gate_ends_the_program_with_status_one(wrong: int, status: int, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", answers(wrong))
    command = [sys.executable, "-m", "mindspeed_llm.quickstart.gates", "base", str(tmp_path / "a.jsonl")]
    found = subprocess.run([*command, "--name", NAME], cwd=REPO, capture_output=True, text=True)
    assert found.returncode == status
    assert ("MISSED" in found.stdout) == bool(status)


def test_each_stage_reads_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = {"identity_train": 20, "identity_held_out": 10}
    write_rows(tmp_path / "before.jsonl", answers())
    write_rows(tmp_path / "after.jsonl", answers(named=named))
    (tmp_path / "quiz.json").write_text(json.dumps(scores(30)), encoding="utf-8")
    words = [str(tmp_path / "after.jsonl"), "--before", str(tmp_path / "before.jsonl"), "--name", NAME]
    assert main(["tuned", *words]) == 0
    assert main(["quiz", str(tmp_path / "quiz.json")]) == 1
    assert main(["guard", str(tmp_path / "none.jsonl")]) == 1
    assert capsys.readouterr().out.count("MISSED") == 3
    with pytest.raises(InputError, match=r"absent\.json"):
        main(["quiz", str(tmp_path / "absent.json")])


def watched(*programs: str) -> list[dict[str, Any]]:
    """Lines of processes that said that they are watched."""
    return [{"what": "watched", "pid": 1, "program": program, "detail": ""} for program in programs]


def test_the_watch_wants_every_program_no_early_model_and_one_in_the_last_step() -> None:
    last = {"what": "built", "pid": 2, "program": "-m mindspeed_llm.quickstart.verify", "detail": "Qwen3ForCausalLM"}
    early = {**last, "program": "inference.py"}
    assert passed(guard_gates([*watched(*PROGRAMS), last])) == [True, True, True]
    assert passed(guard_gates([*watched(*PROGRAMS[1:]), last])) == [False, True, True]
    assert passed(guard_gates([*watched(*PROGRAMS), early, last])) == [True, False, True]
    assert passed(guard_gates(watched(*PROGRAMS))) == [True, True, False]


def test_a_watched_process_that_builds_a_transformers_model_fails_and_is_recorded(tmp_path: Path) -> None:
    site = guard.write_site(tmp_path / "guard")
    log = tmp_path / "watch.jsonl"
    code = (
        "from transformers import Qwen3Config, Qwen3Model; Qwen3Model(Qwen3Config(num_hidden_layers=0, vocab_size=8))"
    )
    for allow in ("0", "1"):
        environment = {**os.environ, "PYTHONPATH": str(site), guard.LOG: str(log), guard.ALLOW: allow}
        found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert (found.returncode == 0) == (allow == "1"), found.stderr
        assert ("ModelBuilt" in found.stderr) == (allow == "0")
    lines = guard.read_log(log)
    assert [line["what"] for line in lines] == ["watched", "built"] * 2
    assert {line["detail"] for line in lines if line["what"] == "built"} == {"Qwen3Model"}


def test_the_watch_runs_the_site_file_it_hides_and_does_nothing_without_a_log(tmp_path: Path) -> None:
    site = guard.write_site(tmp_path / "guard")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text("print('the other one')\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{tmp_path / 'other'}"}
    environment.pop(guard.LOG, None)
    code = "import sys; print(any('quickstart' in type(f).__module__ for f in sys.meta_path))"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[:2] == ["the other one", "False"]


def test_prompts_ask_every_question_and_a_few_of_each_kind_are_shown(tmp_path: Path) -> None:
    make_prompts(tmp_path)
    rows = read_rows(tmp_path / "prompts.jsonl")
    assert {row["kind"] for row in rows} == {"answer", "identity_train", "identity_held_out"}
    shown = [rows[number] for number in chosen(rows)]
    assert [row["kind"] for row in shown] == ["answer"] * 2 + ["identity_train"] * 2 + ["identity_held_out"] * 2
    assert [row["prompt"].isascii() for row in shown] == [True, False] * 3


def test_answers_that_differ_from_the_export_are_named() -> None:
    class Letters:
        """A tokenizer of letters."""

        def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
            """Letters of the ids."""
            return "".join(map(chr, ids))

    rows = [{"answer": "ab"}, {"answer": "cd"}]
    assert differences(Letters(), rows, [[97, 98], [99, 101]]) == [1]
