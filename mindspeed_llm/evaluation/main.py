"""`evaluation.py`: parse, choose the device, load the model, score it through lm-eval."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.programs import EvaluateOptions
from mindspeed_llm.errors import InputError, UsageError, lookup

TASKS = {"mmlu": "mindspeed_llm.evaluation.mmlu"}


def main(argv: list[str]) -> int:
    """Score a model; -> exit status."""
    options = parse(EvaluateOptions, argv, "evaluation.py")
    wanted = options.evaluation
    for task in wanted.task:
        lookup("--task", task, TASKS)
    if not wanted.task_data_path:
        raise UsageError("--task-data-path is missing: the folder with the benchmark's files")
    if not wanted.no_chat_template:
        raise UsageError("--no-chat-template false: mmlu is asked in plain text, as lm-eval does; leave the flag out")
    prepare_offline()
    from mindspeed_llm.evaluation.mmlu import load_tasks

    paths = wanted.task_data_path if len(wanted.task_data_path) > 1 else wanted.task_data_path * len(wanted.task)
    tasks = [load_tasks(path, wanted.num_fewshot) for path in paths]
    from mindspeed_llm import device
    from mindspeed_llm.device import quiet

    quiet.silence()
    chosen = device.select(options.device.device)
    # megatron-core sees the device only when imported after this choice
    from mindspeed_llm.checkpoint.recorded import tokenizer_folder
    from mindspeed_llm.data.tokenizer import load_tokenizer
    from mindspeed_llm.evaluation.harness import LiveLM
    from mindspeed_llm.inference.live import load_model, open_sources
    from mindspeed_llm.models import parallel

    parallel.connect(chosen, options.device.distributed_timeout_minutes)
    try:
        sources = open_sources(options)
        folder = tokenizer_folder(options.tokenizer, sources.base)
        if folder is None:
            raise InputError(f"{sources.base_path} has no tokenizer beside it; give --tokenizer-name-or-path")
        model = load_model(options, sources, chosen)
        own = model.config.max_position_embeddings
        length = min(options.seq_length or own, options.model.max_position_embeddings or own, own)
        live = LiveLM(model, load_tokenizer(folder), wanted.evaluation_batch_size, length)
        scores = {}
        for task, configs in zip(wanted.task, tasks, strict=True):
            began = time.perf_counter()
            found = score(live, configs, wanted.max_eval_samples)
            scores[task] = {**(found or {}), "seconds": round(time.perf_counter() - began, 2)}
    finally:
        parallel.disconnect()
    if int(os.environ.get("RANK", 0)) == 0:
        for task in wanted.task:
            print_scores(task, scores[task])
        if wanted.output_path:
            write_scores(wanted.output_path, scores, options)
    return 0


def prepare_offline() -> None:
    """Keep lm-eval and its data library from looking for a network, and quiet."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def score(live: Any, configs: list[dict[str, Any]], limit: int | None) -> dict[str, Any] | None:
    """Run one benchmark; -> {"subjects": {name: {n, correct, acc, stderr}}, "total": the same}, None behind rank 0.

    Standard errors are those of a mean of n right-or-wrong answers, sqrt(p (1 - p) / (n - 1)), as lm-eval computes.
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    # not simple_evaluate: it asks pip for the list of all packages, which takes seconds in every process
    tasks = {"tasks": {config["task"]: ConfigurableTask(config=dict(config)) for config in configs}, "groups": {}}
    found = evaluate(live, {**tasks, "group_map": {}}, limit=limit, log_samples=False, bootstrap_iters=0)
    if found is None:  # lm-eval hands its results to rank 0 alone
        return None
    subjects = {}
    for config in configs:
        result = found["results"][config["task"]]
        number = found["n-samples"][config["task"]]["effective"]
        accuracy = result["acc,none"]
        subjects[config["task_alias"]] = summary(number, round(accuracy * number))
    total = summary(sum(s["n"] for s in subjects.values()), sum(s["correct"] for s in subjects.values()))
    shots = {config["task_alias"]: config["num_fewshot"] for config in configs}
    return {"subjects": subjects, "total": total, "num_fewshot": shots}


def summary(n: int, correct: int) -> dict[str, Any]:
    """Accuracy of `correct` out of `n` answers with its standard error (None for a single answer)."""
    accuracy = correct / n
    error = (accuracy * (1 - accuracy) / (n - 1)) ** 0.5 if n > 1 else None
    return {"n": n, "correct": correct, "acc": accuracy, "stderr": error}


def print_scores(task: str, scores: dict[str, Any]) -> None:
    """Upstream's result lines and a table."""
    rows = {**scores["subjects"], "total": scores["total"]}
    for subject, row in scores["subjects"].items():
        print(f"{subject} has {row['correct']} corrects in {row['n']} questions, with accuracy {row['acc']}")
    total = scores["total"]
    print(f"{task} acc = {total['correct']}/{total['n']}={total['acc']:.6f}")
    width = max(len(name) for name in (*rows, "subject"))
    print(f"{'subject':<{width}}  question_n     acc  stderr")
    for name, row in rows.items():
        error = "-" if row["stderr"] is None else f"{row['stderr']:.4f}"
        print(f"{name:<{width}}  {row['n']:>10}  {row['acc']:.4f}  {error:>6}")
    print(f"{task.upper()} Running Time: {scores['seconds']:.2f}s", flush=True)


def write_scores(path: str, scores: dict[str, Any], options: EvaluateOptions) -> None:
    """The scores as JSON, atomically."""
    from mindspeed_llm.checkpoint.atomic import write_text

    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {"load": options.checkpoint.load, "lora_load": options.lora.lora_load, "results": scores}
    write_text(target, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print(f"scores written to {target}", flush=True)
