"""One size's ten recipes, run one after the other as a new user would, each at another layout where that is allowed."""

import csv
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.contract.test_recipes import recipe, run_recipe
from tests.fixtures import hf_model, sentence

QUESTION = "the red fish"
ANSWER = re.compile(r"MindSpeed-LLM:\n(.*?)\n={40,}", re.DOTALL)


def step(name: str, cwd: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    result = run_recipe(recipe(name), *words, cwd=cwd, MASTER_PORT=str(free_port()), **environment)
    assert result.returncode == 0, f"{name}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
    assert (cwd / "logs" / f"{name}.log").stat().st_size, f"{name} left no log"
    return result


def write_inputs(folder: Path) -> None:
    """Alpaca rows as jsonl, and an MMLU-like folder of two subjects."""
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as rows:
        for n in range(24):
            row = {"instruction": sentence(n, 3), "input": "", "output": sentence(n + 50, 2 + n % 5)}
            rows.write(json.dumps(row, ensure_ascii=False) + "\n")
    for part, count in (("dev", 3), ("test", 6)):
        (folder / "mmlu" / part).mkdir(parents=True)
        for subject in ("colours", "animals"):
            with (folder / "mmlu" / part / f"{subject}_{part}.csv").open("w", newline="", encoding="utf-8") as file:
                for n in range(count):
                    choices = [sentence(n * 4 + k, 2) for k in range(4)]
                    csv.writer(file).writerow([sentence(n, 4), *choices, "ABCD"[n % 4]])


@pytest.mark.timeout(300)
def test_the_ten_recipes_of_one_size_lead_from_a_folder_to_a_tuned_one(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    hf = str(hf_model())
    shared = {"TOKENIZER_PATH": hf, "CKPT_LOAD_DIR": "./mcore", "CHECKPOINT": "./mcore", "CHECKPOINT_LORA": "./lora"}
    short = {"DATA_PATH": "./data/rows", "TRAIN_ITERS": "3", "MBS": "2", "GBS": "4", "SEQ_LENGTH": "64"}
    quiz = {"DATA_PATH": "./mmlu"}
    step("ckpt_convert_qwen3_hf2mcore", tmp_path, LOAD_DIR=hf, SAVE_DIR="./mcore", TP="1", PP="2")
    step("data_convert_qwen3_instruction", tmp_path, TOKENIZER_PATH=hf, INPUT="rows.jsonl", OUTPUT_PREFIX="./data/rows")
    tune = {**shared, **short}
    step("tune_qwen3_8b_4K_full_ptd", tmp_path, **tune, CKPT_SAVE_DIR="./full", TP="1", PP="2")
    step("tune_qwen3_8b_4K_lora_ptd", tmp_path, "--lr", "0.02", **tune, CKPT_SAVE_DIR="./lora", TP="2", PP="1")
    words = ("--max-new-tokens", "8")
    base = step("generate_qwen3_8b_ptd", tmp_path, *words, **shared, PROMPT=QUESTION, TP="1", PP="1")
    tuned = step("generate_qwen3_8b_lora_ptd", tmp_path, *words, **shared, PROMPT=QUESTION, TP="1", PP="2")
    scores = step("evaluate_qwen3_8b_ptd", tmp_path, **{**shared, **quiz}, TP="1", PP="1")
    step("evaluate_qwen3_8b_lora_ptd", tmp_path, **{**shared, **quiz}, TP="2", PP="1")
    step("ckpt_convert_qwen3_mcore2hf", tmp_path, LOAD_DIR="./full", SAVE_DIR="./full_hf")
    step("ckpt_convert_qwen3_mcore2hf_lora", tmp_path, LOAD_DIR="./mcore", CHECKPOINT_LORA="./lora", SAVE_DIR="./out")

    assert "mmlu acc = " in scores.stdout
    answers = [ANSWER.search(result.stdout)[1] for result in (base, tuned)]
    assert answers[1] == transformers_answer(tmp_path / "out"), "the export answers as base and adapter do"
    assert (tmp_path / "full_hf" / "config.json").is_file()


def transformers_answer(folder: Path) -> str:
    """The greedy answer of the exported folder, asked in the template's own words."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.replace("<think>", "").replace("</think>", "").strip("\n")
