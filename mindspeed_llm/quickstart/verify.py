"""The last step: the exported model in transformers gives the tokens our engine gave.

`python -m mindspeed_llm.quickstart.verify --help`
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindspeed_llm.cli import run
from mindspeed_llm.quickstart.make import read_rows

SHOWN = 3  # questions printed with their tokens
BATCH = 32


def transformers_answers(folder: Path, questions: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """Greedy answers of an exported model through transformers' own chat template and `generate`; token ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers = []
    for start in range(0, len(questions), BATCH):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + BATCH]]
        inputs = tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            enable_thinking=False,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            found = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        for row in found[:, inputs["input_ids"].size(1) :].tolist():
            end = next((position for position, token in enumerate(row) if token in ends), len(row))
            answers.append(row[:end])
    return answers


def differences(tokenizer: Any, rows: Sequence[dict[str, Any]], answers: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of the rows whose `answer` is not the text of the tokens beside it."""
    return [
        number
        for number, (row, ids) in enumerate(zip(rows, answers, strict=True))
        if tokenizer.decode(ids, skip_special_tokens=True) != row["answer"]
    ]


def main(argv: Sequence[str]) -> int:
    """Compare, print a few answers with their tokens and a closing line; -> exit status, 1 where they differ."""
    words = argparse.ArgumentParser(prog="python -m mindspeed_llm.quickstart.verify", description=__doc__)
    words.add_argument("model", type=Path, help="folder of the exported model")
    words.add_argument("answers", type=Path, help="our engine's answers (jsonl with prompt and answer)")
    words.add_argument("--max-new-tokens", type=int, default=48)
    options = words.parse_args(argv)
    from mindspeed_llm.data.tokenizer import load_tokenizer

    rows = read_rows(options.answers)
    tokenizer = load_tokenizer(options.model)
    found = transformers_answers(options.model, [row["prompt"] for row in rows], options.max_new_tokens)
    differing = differences(tokenizer, rows, found)
    shown = [number for number, row in enumerate(rows) if row["kind"].startswith("identity")][:SHOWN]
    for number in [*shown, *differing[:SHOWN]]:
        print(f"  {rows[number]['prompt']}")
        print(f"    ours         {tokenizer.encode(rows[number]['answer'])} {rows[number]['answer']}")
        print(f"    transformers {found[number]} {tokenizer.decode(found[number])}")
    tokens = sum(len(ids) for ids in found)
    print(f"{len(rows) - len(differing)}/{len(rows)} answers the same in transformers, {tokens} tokens")
    return 1 if differing else 0


if __name__ == "__main__":
    run(main)
