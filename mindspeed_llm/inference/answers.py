"""Answering one prompt or a file of prompts, in the ways --task names."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from tqdm import tqdm

from mindspeed_llm.arguments.programs import InferenceOptions
from mindspeed_llm.checkpoint.atomic import write_text
from mindspeed_llm.data.templates import Message
from mindspeed_llm.errors import InputError
from mindspeed_llm.inference.generate import Limits, beam_search, generate
from mindspeed_llm.inference.live import LiveModel
from mindspeed_llm.inference.prompts import Prompter, shown, split_thought
from mindspeed_llm.inference.sampling import BeamSampling, greedy, question_seed, sampler

TITLES = {
    "greedy": "=============== Greedy Search ================",
    "do_sample": "================ Do Sample =================",
    "beam_search": "=============== Beam Search =================",
    "beam_search_with_sampling": "======== Beam Search with sampling ==========",
}
RULE = "=" * 46


class Answerer:
    """Prompt ids to answer ids, by any task."""

    def __init__(self, options: InferenceOptions, model: LiveModel, prompter: Prompter) -> None:
        self.options, self.model, self.prompter = options, model, prompter
        wanted, own = options.generation, model.config.max_position_embeddings
        length = min(wanted.max_length or own, options.seq_length or own, options.model.max_position_embeddings or own)
        self.limits = Limits(wanted.max_new_tokens, min(length, own), prompter.stop_ids)
        self.asked = 0

    def __call__(
        self,
        task: str,
        prompts: list[list[int]],
        on_token: Callable[[int], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Answers to prompts of one length.

        Args:
            on_token: is told the first answer's tokens.
            numbers: of the questions, which decide what is drawn for them; left out, they are counted.
        """
        if numbers is None:
            numbers = range(self.asked, self.asked + len(prompts))
            self.asked += len(prompts)
        wanted = self.options.generation
        draw = wanted.temperature, wanted.top_k, wanted.top_p
        seeds = [question_seed(self.options.seed, number) for number in numbers]
        if not task.startswith("beam"):
            choose = greedy if task == "greedy" else sampler(*draw, seeds)
            return generate(self.model, prompts, self.limits, choose, wanted.use_kv_cache, on_token)
        answers = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            sampling = BeamSampling(*draw, seed) if task.endswith("sampling") else None
            beams, penalty = wanted.num_beams, wanted.length_penalty
            answers.append(beam_search(self.model, prompt, self.limits, beams, penalty, sampling, wanted.use_kv_cache))
        return answers

    def reply(self, prompt: list[int], on_token: Callable[[int], None] | None) -> list[int]:
        """A sampled answer to one prompt, as in a chat."""
        return self("do_sample", [prompt], on_token)[0]


def print_answer(answerer: Answerer, task: str, question: str, output: str | None = None) -> None:
    """One question in upstream's frame, on rank 0; with `output` also as a row of jsonl there."""
    ids = answerer.prompter.encode([Message(role="user", content=question)])
    began = time.perf_counter()
    answer = answerer(task, [ids])[0]
    if torch.distributed.get_rank() == 0:
        text = shown(answerer.prompter.text(answer))
        print(f"\n{TITLES[task]}\n\nYou:\n{question}\n\nMindSpeed-LLM:\n{text}\n{RULE}\n", flush=True)
        print(f"Elapsed: {time.perf_counter() - began:.2f}s", flush=True)
        if output is not None:
            write_answers(output, [_with_answer({"prompt": question}, answerer.prompter, answer)])


def read_questions(path: str) -> list[dict[str, Any]]:
    """Rows with the keys `prompt`, or `messages`, or `instruction` and `input`.

    Raises:
        InputError: no such file, not JSON, or a row without a question; file and row are named.
    """
    rows = []
    for number, row in enumerate(_raw_rows(path)):
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, dict) or question_of(row) is None:
            raise InputError(
                f"{path}: row {number} has no question: expected the key prompt or instruction, "
                "or messages in which user and assistant speak in turn, the user last"
            )
        rows.append(row)
    if not rows:
        raise InputError(f"{path} holds no questions")
    return rows


def _raw_rows(path: str) -> Iterable[Any]:
    """Lines of a .txt file, or the rows of any data file preprocessing reads."""
    if not Path(path).is_file():
        raise InputError(f"--input-file {path}: no such file")
    if path.endswith(".txt"):
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return _parsed(path)


def _parsed(path: str) -> list[Any]:
    """Rows of a jsonl file, or of a JSON list."""
    text = Path(path).read_text(encoding="utf-8-sig")
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise InputError(f"--input-file {path}: not JSON lines ({error})") from error


def question_of(row: dict[str, Any]) -> list[Message] | None:
    """The messages of a row, ending with the question; None when it has none."""
    if isinstance(row.get("messages"), list) and row["messages"]:
        return _turns(row["messages"])
    text = row.get("prompt")
    if text is None and isinstance(row.get("instruction"), str):
        text = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return [Message(role="user", content=text)] if isinstance(text, str) and text else None


def _turns(messages: list[Any]) -> list[Message] | None:
    """Messages without the system's; None unless user (or observation) and assistant speak in turn, the user last."""
    if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        return None
    turns = [Message(role=m.get("role"), content=m["content"]) for m in messages if m.get("role") != "system"]
    speakers = [("user", "observation") if (len(turns) - n) % 2 else ("assistant",) for n in range(len(turns))]
    fits = all(turn["role"] in speaker for turn, speaker in zip(turns, speakers, strict=True))
    return turns if len(turns) % 2 and fits else None


def system_of(row: dict[str, Any]) -> str | None:
    """The system text of a row."""
    listed = [m["content"] for m in row.get("messages") or [] if isinstance(m, dict) and m.get("role") == "system"]
    return listed[0] if listed else row.get("system")


def answer_file(answerer: Answerer, task: str, path: str, output: str | None) -> None:
    """Answer every row of a file; rows of equal prompt length run together, --micro-batch-size at a time.

    Data-parallel replicas share the rows. The answers are written as jsonl in the order of the questions, each row
    with `answer` (and `thought`, where there is one) added; without --output-file they are printed.
    """
    rows = read_questions(path)
    prompts = [answerer.prompter.encode(question_of(row) or [], system_of(row)) for row in rows]
    check_room(prompts, answerer.limits, path)
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = sorted(range(replica, len(rows), replicas), key=lambda i: (len(prompts[i]), i))
    groups: list[list[int]] = []
    for i in mine:
        full = not groups or len(groups[-1]) >= answerer.options.micro_batch_size
        if full or len(prompts[groups[-1][0]]) != len(prompts[i]):
            groups.append([])
        groups[-1].append(i)
    speaker = torch.distributed.get_rank() == 0
    done: dict[int, list[int]] = {}
    with tqdm(total=len(mine), unit="row", disable=not speaker or None) as bar:
        for group in groups:
            done.update(zip(group, answerer(task, [prompts[i] for i in group], numbers=group), strict=True))
            bar.update(len(group))
    shared: list[Any] = [None] * replicas
    torch.distributed.all_gather_object(shared, done, group=parallel_state.get_data_parallel_group())
    if not speaker:
        return
    answers = {i: ids for part in shared for i, ids in part.items()}
    done_rows = [_with_answer(rows[i], answerer.prompter, answers[i]) for i in sorted(answers)]
    if output is None:
        print("\n".join(json.dumps(row, ensure_ascii=False) for row in done_rows), flush=True)
    else:
        write_answers(output, done_rows)


def check_room(prompts: Sequence[Sequence[int]], limits: Limits, path: str) -> None:
    """Refuse questions that leave no room for an answer before the first one is answered.

    Raises:
        InputError: naming the file and the first such row.
    """
    for number, prompt in enumerate(prompts):
        try:
            limits.room(prompt)
        except InputError as error:
            raise InputError(f"{path}: row {number}: {error}") from error


def write_answers(output: str, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as jsonl, atomically."""
    target = Path(output).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} answers written to {output}", flush=True)


def _with_answer(row: dict[str, Any], prompter: Prompter, ids: list[int]) -> dict[str, Any]:
    thought, answer = split_thought(prompter.text(ids))
    return {**row, "answer": answer, **({"thought": thought} if thought else {})}
