"""`posttrain_gpt.py --stage dpo`: a run follows TRL's own training loop, whatever the layout; what it refuses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

from mindspeed_llm.data.pairs import PairDataset
from tests.fixtures import (
    LORA,
    close,
    data,
    done,
    hf_model,
    launch,
    losses,
    once,
    records,
    refused,
    same,
    scratch,
    sentence,
    training,
    weights,
)

STEPS, RATE, BETA = 4, 0.01, 0.5
FLAT = ("--lr", RATE, "--min-lr", RATE, "--lr-warmup-iters", 0, "--lr-decay-style", "constant", "--weight-decay", 0)
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
           "logps/rejected")  # fmt: skip


@once
def pair_rows(rows: int = 19) -> Path:
    """Rows of a question with a chosen and a rejected answer."""
    file = scratch() / f"pairs_{rows}.jsonl"
    made = [
        {"instruction": sentence(n, 2 + n % 5), "input": "", "chosen": sentence(n + 100, 1 + n * 7 % 13),
         "rejected": sentence(n + 200, 1 + n * 5 % 11)}
        for n in range(rows)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    return file


HANDLER = ("--handler-name", "AlpacaStylePairwiseHandler", "--prompt-type", "qwen3")


@once
def pair_data(extra: tuple[str, ...] = ()) -> Path:
    """A prefix of preprocessed pairs."""
    prefix = scratch() / "data" / f"pairs_{'_'.join(extra).replace('--', '')}"
    argv = ["--input", pair_rows(), "--output-prefix", prefix, "--tokenizer-name-or-path", hf_model(), *HANDLER, *extra]
    done(launch(1, "preprocess_data.py", argv))
    return prefix


@once
def adapter() -> Path:
    """A PEFT folder whose factors are all random: with B zero, chosen and rejected would be alike at first."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3ForCausalLM

    folder = scratch() / "dpo_adapter"
    model = get_peft_model(Qwen3ForCausalLM.from_pretrained(hf_model()), lora_config())
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def lora_config() -> Any:
    """Settings of the adapter: layers whose factors peft and megatron-core hold alike."""
    from peft import LoraConfig

    return LoraConfig(r=3, lora_alpha=6, target_modules=["o_proj", "down_proj"], lora_dropout=0.0)


def run(save: Path, *more: object, size: int = 1, steps: int = STEPS, start: bool = True) -> None:
    """Train on pairs; `start` from the random adapter."""
    begin = ("--lora-load", adapter(), "--finetune") if start else LORA
    where = () if "--dataset" in more else ("--data-path", pair_data())
    length = () if "--seq-length" in more else ("--seq-length", 256)
    words = training(save, *where, *length, *FLAT, *begin, *more, lora=False, steps=steps)
    words[words.index("--stage") + 1] = "dpo"
    done(launch(size, "posttrain_gpt.py", words))


def trl_history(rows: Sequence[int], **settings: Any) -> list[dict[str, float]]:
    """What TRL's own loop logs step by step: 2 micro-batches of 2 pairs, AdamW at a constant rate.

    Args:
        rows: the pairs in the order they are trained on.
    """
    import torch
    from datasets import Dataset
    from peft import load_peft_weights, set_peft_model_state_dict
    from transformers import AutoTokenizer, Qwen3ForCausalLM
    from trl import DPOConfig, DPOTrainer

    folder = scratch() / "trl"
    config = DPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=STEPS, logging_steps=1,
        learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=1.0, adam_beta2=0.999, save_strategy="no",
        disable_tqdm=True, **settings,
    )  # fmt: skip
    text = Dataset.from_list([{"prompt": "the", "chosen": "cat", "rejected": "red"}])
    tokenizer = AutoTokenizer.from_pretrained(hf_model())
    model = Qwen3ForCausalLM.from_pretrained(hf_model(), dtype=torch.float32)
    trainer = DPOTrainer(model, args=config, processing_class=tokenizer, train_dataset=text, peft_config=lora_config())
    set_peft_model_state_dict(trainer.model, load_peft_weights(str(adapter()), device="cpu"))
    trainer.train_dataset = Dataset.from_list([stored(row) for row in rows])
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return [log for log in trainer.state.log_history if "rewards/margins" in log]


def stored(row: int) -> dict[str, list[int]]:
    """A pair of the files in TRL's words."""
    pair = PairDataset(pair_data())[row]
    prompt = int((pair["chosen"]["labels"] == -100).sum())
    answers = {f"{side}_ids": pair[side]["input_ids"][prompt:].tolist() for side in ("chosen", "rejected")}
    return {"prompt_ids": pair["chosen"]["input_ids"][:prompt].tolist(), **answers}


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (("--dpo-beta", BETA), {"beta": BETA, "max_length": None}),
        (("--beta", 0.3, "--loss-type", "ipo"), {"beta": 0.3, "loss_type": "ipo", "max_length": None}),
        (("--dpo-loss-type", "hinge", "--seq-length", 64), {"beta": 0.1, "loss_type": "hinge", "max_length": 64}),
    ],
    ids=["sigmoid", "ipo", "hinge-and-long-answers-cut"],
)
def test_a_run_follows_trls_own_loop(flags: tuple, settings: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path / "ours", "--no-shuffle", *flags)
    theirs = trl_history(range(STEPS * 4), **settings)
    ours = records(tmp_path / "ours")
    assert len(ours) == len(theirs) == STEPS
    for name in ("loss", "grad_norm", *METRICS):
        told = [log[name] for log in theirs]
        scale = numpy.abs(told).max()
        assert [record[name] for record in ours] == pytest.approx(told, abs=2e-5 * scale), name
    assert len({record["rewards/margins"] for record in ours}) == STEPS
