"""The sides of the epoch benchmark: our own training loop, transformers' Trainer in two settings, TRL's SFTTrainer.

Each trains an adapter for one epoch in a process of its own and stops where its next slice of steps begins. Nothing
inside a loop is replaced: ours waits where it asks its feed for rows, the peers in a callback.
"""

import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pairs import READY, channel
from train_step import ALPHA, PEER_TARGETS, RANK, TARGETS

RATE = 1e-3
BATCH = 8
"""Rows of an optimizer step."""
SEED = 7
TRAIN, HELD_OUT = "train", "valid"
PACKED_TRL = "trl"


class Slices:
    """Lets a training loop go on slice by slice, and times what it does in between.

    A request is the number of steps that may follow; the answer comes when the next one would begin, or at the end.
    """

    def __init__(self, clock: str) -> None:
        """Args: clock: "wall", or "cpu" for the process's own processor time."""
        self.requests, self.answer = channel()
        self.wall = clock == "wall"
        self.left, self.done, self.began = 0, 0, 0.0

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter() if self.wall else time.process_time()

    def begin(self) -> None:
        """The loop is about to start: wait for the first request."""
        self.answer(READY)
        self._wait()

    def _wait(self) -> None:
        self.left, self.done, self.began = int(next(self.requests)), 0, self.now()

    def step_begins(self) -> None:
        """Called by the loop before each step."""
        if self.left == 0:
            self.answer({"seconds": self.now() - self.began, "steps": self.done})
            self._wait()
        self.left, self.done = self.left - 1, self.done + 1

    def end(self, finish: Callable[[], dict[str, Any]]) -> None:
        """The loop has ended, its last save included; `finish` says what it came to, outside of the time."""
        seconds = self.now() - self.began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.answer({"seconds": seconds, "steps": self.done, "peak": peak, "end": finish()})


def read_rows(folder: Path, part: str) -> list[dict[str, list[int]]]:
    """The rows that `sft_epoch.write_rows` has written, as lists."""
    from mindspeed_llm.data.dataset import IndexedDataset

    source = IndexedDataset(folder / part)
    fields = ("input_ids", "labels")
    return [{name: source[n][name].tolist() for name in fields} for n in range(len(source))]


def our_words(folder: Path, dtype: str) -> list[str]:
    """The command line of posttrain_gpt.py: rows without padding, CCLoRA and the fused MLP."""
    return [
        *("--stage", "sft", "--finetune", "--load", str(folder / "model"), "--save", str(folder / f"ours_{dtype}")),
        *("--train-data-path", str(folder / TRAIN), "--valid-data-path", str(folder / HELD_OUT), "--eval-iters", "0"),
        *("--lora-r", str(RANK), "--lora-alpha", str(ALPHA), "--lora-target-modules", *TARGETS),
        *("--lora-fusion", "--use-fused-mlp", "--padding-free", "--calculate-per-token-loss"),
        *("--micro-batch-size", str(BATCH), "--global-batch-size", str(BATCH), "--epochs", "1", "--seed", str(SEED)),
        *("--lr", str(RATE), "--lr-decay-style", "linear", "--weight-decay", "0", "--seq-length", "4096"),
        *("--log-dir", str(folder / "logs"), "--device", "cpu", "--bf16" if dtype == "bfloat16" else "--fp32"),
    ]


def train_ours(folder: Path, dtype: str, slices: Slices) -> None:
    """What posttrain_gpt.py does with `our_words`, one epoch."""
    from mindspeed_llm import device
    from mindspeed_llm.arguments.parser import parse
    from mindspeed_llm.arguments.programs import PosttrainOptions

    options = parse(PosttrainOptions, our_words(folder, dtype), "posttrain_gpt.py")
    chosen = device.select(options.device.device)
    from mindspeed_llm.models import parallel
    from mindspeed_llm.training import loop
    from mindspeed_llm.training.engine import evaluate
    from mindspeed_llm.training.feed import Feed
    from mindspeed_llm.training.setup import prepare
    from mindspeed_llm.training.watch import open_report

    parallel.connect(chosen, options.device.distributed_timeout_minutes)
    run = prepare(options, chosen)
    report, rows = open_report(run, loop.announcement(run)), run.feed.batches

    def paced(consumed: int) -> Any:
        slices.step_begins()
        return rows(consumed)

    run.feed.batches = paced  # type: ignore[method-assign]
    slices.begin()
    loop.train(run, report)

    def finish() -> dict[str, Any]:
        held = run.validation
        again = Feed(held.source, held.sampler, held.collate, held.device)  # the loop has closed the run's own
        loss = evaluate(run.engine, again.walk(math.ceil(len(held.source) / BATCH)))
        return {"losses": [float(record["loss"]) for record in report.records], "held_out": loss}

    slices.end(finish)
    parallel.disconnect()


def peer_model(folder: Path, dtype: str, adapters_like_base: bool) -> Any:
    """transformers' model with peft's adapters.

    Args:
        adapters_like_base: keep adapters in the model's type; peft's default is float32.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(SEED)
    kind = getattr(torch, dtype)
    base = Qwen3ForCausalLM.from_pretrained(folder / "model", dtype=kind, attn_implementation="sdpa")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PEER_TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(base, config, autocast_adapter_dtype=not adapters_like_base)


def tokenizer_of(folder: Path) -> Any:
    """The least tokenizer that the peers' collators take: they read its pad token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def pacing(slices: Slices) -> Any:
    """A callback that stops a Trainer between slices."""
    from transformers import TrainerCallback

    class Pacing(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
            slices.step_begins()

    return Pacing()


def settings(folder: Path, side: str, dtype: str) -> dict[str, Any]:
    """What all of the peers' runs have in common with ours; everything else is the peers' default."""
    return {
        "output_dir": str(folder / f"{side}_{dtype}"),
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "seed": SEED,
        "disable_tqdm": True,
    }


def trainer(folder: Path, side: str, dtype: str, slices: Slices) -> Any:
    """transformers' Trainer: `default` (random order, padded batches, float32 adapters) or `best` (like lengths)."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    best = side == "best"
    grouped = {"train_sampling_strategy": "group_by_length"} if best else {}
    arguments = TrainingArguments(**settings(folder, side, dtype), per_device_train_batch_size=BATCH, **grouped)
    return Trainer(
        model=peer_model(folder, dtype, adapters_like_base=best),
        args=arguments,
        train_dataset=Dataset.from_list(read_rows(folder, TRAIN)),
        data_collator=DataCollatorForSeq2Seq(tokenizer_of(folder)),
        callbacks=[pacing(slices)],
    )


def trl_trainer(folder: Path, side: str, dtype: str, slices: Slices) -> Any:
    """TRL's SFTTrainer with best-fit packing; a pack has as many tokens as `BATCH` rows on average."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = read_rows(folder, TRAIN)
    steps = math.ceil(len(rows) / BATCH)
    tokens = sum(len(row["input_ids"]) for row in rows)
    arguments = SFTConfig(
        **settings(folder, side, dtype),
        per_device_train_batch_size=1,
        packing=True,
        max_length=math.ceil(1.03 * tokens / steps),  # room, or the last pack is a step of a few tokens
        gradient_checkpointing=False,
        bf16=False,  # the model has its type already; autocast on top of it is slower
        shuffle_dataset=True,
    )
    return SFTTrainer(
        model=peer_model(folder, dtype, adapters_like_base=True),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(folder),
        callbacks=[pacing(slices)],
    )


def sees_other_rows(model: Any) -> bool:
    """Whether a row's result changes with the row before it in the same pack."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 1000, (2, 24), generator=generator)
    tokens[1, 12:] = tokens[0, 12:]
    positions = torch.arange(12).repeat(2)[None]
    with torch.no_grad():
        one, two = (model(input_ids=row[None], position_ids=positions).logits[0, 12:] for row in tokens)
    return not torch.equal(one, two)


def mean_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Mean loss per trained token, row by row."""
    import torch

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for row in rows:
            tokens, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            trained = int((labels[0, 1:] != -100).sum())
            total += float(model(input_ids=tokens, labels=labels).loss) * trained
            count += trained
    return total / count


def train_peer(folder: Path, side: str, dtype: str, slices: Slices) -> None:
    """One epoch of a peer's loop."""
    make = trl_trainer if side == PACKED_TRL else trainer
    loop = make(folder, side, dtype, slices)
    slices.begin()
    loop.train()

    def finish() -> dict[str, Any]:
        losses = [record["loss"] for record in loop.state.log_history if "loss" in record]
        mixed = side == PACKED_TRL and sees_other_rows(loop.model.eval())
        return {"losses": losses, "held_out": mean_loss(loop.model, read_rows(folder, HELD_OUT)), "mixed": mixed}

    slices.end(finish)


def serve(side: str, folder: Path, dtype: str, clock: str) -> None:
    """A worker's whole life."""
    slices = Slices(clock)
    if side == "ours":
        train_ours(folder, dtype, slices)
    else:
        train_peer(folder, side, dtype, slices)
