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
    from peft import get_peft_model
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
    where = ("--data-path", None if "--dataset" in more else pair_data())
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
    loop = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "logging_steps": 1}
    rate = {"learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "adam_beta2": 0.999}
    off = {"bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    config = DPOConfig(output_dir=str(folder), use_cpu=True, **loop, **rate, **off, **settings)
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


@once
def alone(objective: tuple = ()) -> Path:
    """A run of one process."""
    save = scratch() / f"dpo_alone_{len(objective)}"
    run(save, *objective)
    return save


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (1, ("--padding-free", "--pref-ftx", 0.2)),
        (2, ("--tensor-model-parallel-size", 2, "--sequence-parallel")),
        (2, ("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1)),
        (2, ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")),
        (2, ("--context-parallel-size", 2)),
    ],
    ids=["padding-free", "sequence-parallel", "interleaved", "data-parallel", "context-parallel"],
)
def test_every_layout_trains_as_one_process(size: int, flags: tuple, tmp_path: Path) -> None:
    single = alone(("--pref-ftx", 0.2) if "--pref-ftx" in flags else ())
    run(tmp_path / "layout", *flags, size=size)
    for name in ("loss", *METRICS):
        expected, found = ([record[name] for record in records(save)] for save in (single, tmp_path / "layout"))
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5 * numpy.abs(expected).max()), name
    close(weights(tmp_path / "layout"), weights(single), 1e-4)


def test_raw_pairs_are_prepared_within_training_and_validated_pair_by_pair(tmp_path: Path) -> None:
    run(tmp_path / "files", "--split", "80,20,0", "--no-shuffle")
    raw = ("--dataset", pair_rows(), *HANDLER, "--tokenizer-name-or-path", hf_model())
    words = ("--data-cache-dir", tmp_path / "cache", "--split", "80,20,0", "--no-shuffle", *raw)
    run(tmp_path / "raw", *words)
    assert losses(tmp_path / "raw") == losses(tmp_path / "files")
    same(weights(tmp_path / "raw"), weights(tmp_path / "files"))


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run(tmp_path / "parts", "--save-interval", 2, "--lr-decay-iters", STEPS, steps=2)
    run(tmp_path / "parts", "--auto-resume")
    assert records(tmp_path / "parts")[-1]["loss"] == records(alone())[-1]["loss"]
    same(weights(tmp_path / "parts"), weights(alone()))


def test_an_untrained_adapter_is_the_reference_itself(tmp_path: Path) -> None:
    run(tmp_path / "new", start=False, steps=1)
    (first,) = records(tmp_path / "new")
    assert first["loss"] == pytest.approx(numpy.log(2), rel=1e-6)
    assert [first[name] for name in METRICS[:4]] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("flags", "status", "pattern"),
    [
        (("--data-path", data), 1, r"holds rows with answers, which --stage sft reads.*AlpacaStylePairwiseHandler"),
        (("--stage", "sft", "--dpo-beta", 0.2), 2, "--dpo-beta belongs to --stage dpo, and the stage is sft"),
        (("--stage", "sft"), 1, r"holds pairs of answers, which --stage dpo reads.*AlpacaStyleInstructionHandler"),
        (("--lora-r", None, "--lora-alpha", None, "--lora-target-modules", None), 2, "dpo compares with the base"),
        (("--calculate-per-token-loss",), 2, "weighs pairs, not tokens"),
        (("--is-instruction-dataset",), 2, "reads pairs of answers"),
        (("--loss-type", "ipo", "--label-smoothing", 0.1), 2, "--dpo-loss-type ipo knows no flipped labels"),
        (("--label-smoothing", 0.5), 2, "--dpo-label-smoothing 0.5: must be at least 0 and below 0.5"),
        (("--dpo-beta", 0), 2, "--dpo-beta 0.0: must be above 0"),
        (("--pref-ftx", -1), 2, "--pref-ftx -1.0: must not be negative"),
        (("--ref-model", "x"), 2, "the reference of --stage dpo is --load without the adapter"),
        (("--rpo-alpha", 1), 2, "has the weight --pref-ftx"),
        (("--rlhf-type", "kto"), 2, "kto"),
        (("--data-path", None, "--dataset", pair_rows, "--handler-name", "AlpacaStyleInstructionHandler",
          "--prompt-type", "qwen3", "--tokenizer-name-or-path", hf_model), 2, "no pairs of answers that --stage dpo"),
    ],
)  # fmt: skip
def test_what_dpo_cannot_do_is_refused_in_one_line(flags: tuple, status: int, pattern: str, tmp_path: Path) -> None:
    words = training(tmp_path / "x", *(() if "--data-path" in flags else ("--data-path", pair_data())))
    words[words.index("--stage") + 1] = "dpo"
    for flag, value in zip(flags[::2], [*flags[1::2], None], strict=False):
        value = value() if callable(value) else value
        if flag in words:
            at = words.index(flag)
            end = next((n for n in range(at + 1, len(words)) if str(words[n]).startswith("--")), len(words))
            words[at:end] = []
        words += [flag, *([] if value is None else [value])] if value is not None or len(flags) == 1 else []
    refused(launch(1, "posttrain_gpt.py", words), status, pattern)
