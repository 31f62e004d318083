"""evaluation.py against lm-eval's own transformers backend on the merged export, and what it refuses."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import done, exported, hf_model, launch, mcore_model, refused, scratch, sentence, tuned

SUBJECTS = {"world_facts": (9, 3), "high_school_math": (7, 6), "no_examples": (5, 0)}  # name: test rows, dev rows
LAYOUTS: dict[str, tuple[int, tuple]] = {
    "one": (1, ()),
    "batches of 3": (1, ("--evaluation-batch-size", 3)),
    "TP2": (2, ("--tensor-model-parallel-size", 2)),
    "PP2": (2, ("--pipeline-model-parallel-size", 2, "--evaluation-batch-size", 2)),
    "DP2": (2, ("--evaluation-batch-size", 4)),
}


def write_rows(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def quiz(folder: Path) -> Path:
    """MMLU's layout: test/<subject>_test.csv and dev/<subject>_dev.csv."""
    seed = 0
    for subject, counts in SUBJECTS.items():
        for split, rows in zip(("test", "dev"), counts, strict=True):
            lines = []
            for _ in range(rows):
                seed += 1
                lines.append(
                    [sentence(seed, 3 + seed % 4), *(sentence(seed + k, 1) for k in range(4)), "ABCD"[seed % 4]]
                )
            if lines:
                write_rows(folder / split / f"{subject}_{split}.csv", lines)
    return folder


@pytest.fixture(scope="module")
def folder() -> Path:
    path = scratch() / "mmlu"
    return path if path.exists() else quiz(path)


def command(folder: Path, *more: Any, adapter: bool = True) -> list[Any]:
    words = ["--task", "mmlu", "--task-data-path", folder, "--load", hf_model(), *more]
    return [*words, *(("--lora-load", tuned()) if adapter else ())]


def evaluate(folder: Path, output: Path, *more: Any, size: int = 1, adapter: bool = True) -> tuple[str, dict[str, Any]]:
    out = done(launch(size, "evaluation.py", command(folder, *more, "--output-path", output, adapter=adapter))).out
    return out, json.loads(output.read_text())["results"]["mmlu"]


@pytest.fixture(scope="module", params=[False, True], ids=["base", "base and adapter"])
def reference(request: pytest.FixtureRequest, folder: Path) -> tuple[bool, dict[str, Any]]:
    """lm-eval's results and samples with its transformers backend."""
    from mindspeed_llm.evaluation.main import prepare_offline
    from mindspeed_llm.evaluation.mmlu import load_tasks

    prepare_offline()
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = str(exported() if request.param else hf_model())
    theirs = HFLM(pretrained=model, tokenizer=str(hf_model()), dtype="float32", device="cpu", batch_size=4)
    tasks = [ConfigurableTask(config=dict(config)) for config in load_tasks(str(folder), None)]
    return request.param, simple_evaluate(theirs, tasks=tasks, bootstrap_iters=0, log_samples=True)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_equal_lm_evals_own_backend_at_every_layout(
    layout: str, reference: tuple[bool, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    adapter, wanted = reference
    size, more = LAYOUTS[layout]
    out, found = evaluate(folder, tmp_path / "scores.json", *more, size=size, adapter=adapter)
    assert set(found["subjects"]) == set(SUBJECTS)
    for subject, (rows, _) in SUBJECTS.items():
        theirs, ours = wanted["results"][f"mmlu_{subject}"], found["subjects"][subject]
        assert (ours["n"], ours["acc"]) == (rows, pytest.approx(theirs["acc,none"]))
        assert f"{subject} has {ours['correct']} corrects in {rows} questions" in out
    assert re.search(rf"^mmlu acc = {found['total']['correct']}/21=", out, re.MULTILINE)
    assert found["num_fewshot"] == {"world_facts": 3, "high_school_math": 5, "no_examples": 0}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["one", "batches of 3", "PP2", "TP2"])
def test_log_likelihoods_and_greedy_flags_equal_lm_evals_backend(
    layout: str, reference: tuple[bool, dict[str, Any]]
) -> None:
    from tests.distributed.pool import pool

    adapter, wanted = reference
    size, more = LAYOUTS[layout]
    samples = [s for subject in SUBJECTS for s in wanted["samples"][f"mmlu_{subject}"]]
    requests = [(argument[0], argument[1]) for s in samples for argument in s["arguments"]]
    # also continuations of several tokens, of which some are the greedy choice
    theirs = [answer for s in samples for answer in s["filtered_resps"]]
    assert len(requests) == len(theirs) == 84
    argv = [str(word) for word in command(Path("unused"), *more, adapter=adapter)]
    for ours in pool(size).run("tests.evaluation.tasks:log_likelihoods", argv=argv, requests=requests):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine[0] == pytest.approx(float(other[0]), rel=1e-5, abs=1e-5) and mine[1] == bool(other[1])


def test_continuations_of_several_tokens_and_rows_beyond_the_limit_are_scored_as_lm_eval_does() -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tests.distributed.pool import pool

    model = HFLM(pretrained=str(hf_model()), dtype="float32", device="cpu", batch_size=1, max_length=40)
    requests = [(sentence(n, 2 + 3 * n), " " + sentence(n + 50, 1 + n % 3)) for n in range(12)]
    assert any(len(model.tok_encode(a + b)) > 41 for a, b in requests)
    # continue greedily by the model itself, so that some flags are true
    for context, _ in requests[:4]:
        ids = model.model.generate(_ids(model, context), max_new_tokens=3, do_sample=False, pad_token_id=0)
        text = model.tokenizer.decode(ids[0], skip_special_tokens=False)
        if text.startswith(context):
            requests.append((context, text[len(context) :]))
    instances = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(requests)]
    theirs = model.loglikelihood(instances, disable_tqdm=True)
    argv = [str(w) for w in command(Path("unused"), "--seq-length", 40, "--evaluation-batch-size", 5, adapter=False)]
    ours = pool(1).run("tests.evaluation.tasks:log_likelihoods", argv=argv, requests=requests)[0]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[0] == pytest.approx(float(other[0]), rel=1e-5, abs=1e-5) and mine[1] == bool(other[1])


def _ids(model: Any, text: str) -> Any:
    import torch

    return torch.tensor([model.tok_encode(text)])


def test_the_standard_error_is_lm_evals(tmp_path: Path, folder: Path) -> None:
    from lm_eval.api.metrics import mean_stderr

    out, found = evaluate(folder, tmp_path / "scores.json")
    for row in (*found["subjects"].values(), found["total"]):
        answers = [1.0] * row["correct"] + [0.0] * (row["n"] - row["correct"])
        assert row["stderr"] == pytest.approx(mean_stderr(answers), rel=1e-12)
        assert re.search(rf" {row['n']}  {row['acc']:.4f}  {row['stderr']:.4f}$", out, re.MULTILINE)
    total = found["total"]
    assert total["n"] == 21 and total["correct"] == sum(s["correct"] for s in found["subjects"].values())
    assert "MMLU Running Time:" in out and f"scores written to {tmp_path / 'scores.json'}" in out


def test_a_single_question_has_no_standard_error(tmp_path: Path, folder: Path) -> None:
    out, found = evaluate(folder, tmp_path / "scores.json", "--max-eval-samples", 1)
    assert [row["n"] for row in found["subjects"].values()] == [1, 1, 1] and found["total"]["n"] == 3
    assert all(row["stderr"] is None for row in found["subjects"].values()) and not math.isnan(found["total"]["stderr"])


def test_a_base_from_a_megatron_checkpoint_scores_the_same(tmp_path: Path, folder: Path) -> None:
    _, first = evaluate(folder, tmp_path / "a.json", adapter=False)
    words = ["--task", "mmlu", "--task-data-path", folder / "test", "--load", mcore_model(1, 2)]
    done(launch(1, "evaluation.py", [*words, "--output-path", tmp_path / "b.json"]))
    second = json.loads((tmp_path / "b.json").read_text())["results"]["mmlu"]
    assert first["subjects"] == second["subjects"]


def test_few_shots_are_asked_for_or_as_many_as_there_are(tmp_path: Path, folder: Path) -> None:
    for shots, counts in ((0, [0, 0, 0]), (None, [5, 0, 3])):
        more = () if shots is None else ("--num-fewshot", shots)
        _, found = evaluate(folder, tmp_path / "scores.json", *more)
        assert [found["num_fewshot"][name] for name in sorted(SUBJECTS)] == counts
    words = command(folder, "--num-fewshot", 4)
    refused(launch(1, "evaluation.py", words), 1, "--num-fewshot 4", r"_dev.csv has \d solved examples")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (["q", "a", "b", "c", "d"], r"row 2: expected question, A, B, C, D, answer letter"),
        (["q", "a", "b", "c", "d", "E"], r"row 2: expected"),
        (["q", "a", "b", "c", "d", "A", "x"], r"row 2: expected"),
    ],
)
def test_malformed_questions_name_file_and_row(row: list[str], text: str, tmp_path: Path) -> None:
    good = ["q", "a", "b", "c", "d", "A"]
    write_rows(tmp_path / "test" / "facts_test.csv", [good, row])
    output = tmp_path / "scores.json"
    words = command(tmp_path, "--output-path", output)
    refused(launch(1, "evaluation.py", words), 1, "facts_test.csv", text)
    assert not output.exists()


def test_what_is_missing_or_unknown_is_named(tmp_path: Path, folder: Path) -> None:
    refused(launch(1, "evaluation.py", command(tmp_path)), 1, str(tmp_path), "no <subject>_test.csv")
    refused(launch(1, "evaluation.py", command(tmp_path / "gone")), 1, "no such folder")
    write_rows(tmp_path / "test" / "facts_test.csv", [])
    refused(launch(1, "evaluation.py", command(tmp_path)), 1, "facts_test.csv holds no questions")
    (tmp_path / "test" / "facts_test.csv").write_bytes(b"\xff\xfe\x00,a,b,c,d,A\n")
    refused(launch(1, "evaluation.py", command(tmp_path)), 1, "facts_test.csv")
    words = ["--task-data-path", folder, "--load", hf_model()]
    refused(launch(1, "evaluation.py", ["--task", "mmlo", *words]), 2, "mmlo", "mmlu")
    refused(launch(1, "evaluation.py", ["--task", "mmlu", "--load", hf_model()]), 2, "--task-data-path is missing")
    refused(launch(1, "evaluation.py", ["--task", "mmlu", "--task-data-path", folder]), 2, "--load is missing")


def test_a_failing_task_never_exits_0(tmp_path: Path, folder: Path) -> None:
    output = tmp_path / "scores.json"
    words = [str(word) for word in command(folder, "--output-path", output)]
    from tests.distributed.pool import pool

    with pytest.raises(AssertionError, match="the scorer broke"):
        pool(1).run("tests.evaluation.tasks:with_broken_scorer", argv=words, cwd=str(tmp_path))
    assert not output.exists()
