"""The truth for pairs: TRL's DPOTrainer on transformers' Qwen3 with peft's adapter, stepped by torch's AdamW.

TRL's own collator, loss and metrics run as they are; only its loop is ours, so that a step's micro-batches, gradients
and norms can be seen. Its reference is the base with the adapter off, as it is for a new `peft_config`.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch

from tests.distributed import moe_reference
from tests.distributed.cases import CLIP, SIZES, Arrays
from tests.distributed.double import InDouble, in_double
from tests.distributed.reference import ADAPTED, build_model, by_our_names, optimizer_of, saved_model
from tests.fixtures import write_tokenizer

STEPS = 2
# Two pairs in each micro-batch: (tokens of the prompt, of the chosen answer, of the rejected one).
PAIRS = (((3, 4, 7), (5, 2, 1)), ((1, 9, 3), (6, 6, 6)), ((2, 1, 11), (4, 3, 2)), ((7, 5, 8), (2, 10, 4)))

Pair = dict[str, list[int]]


@dataclass(frozen=True)
class Loss:
    """What is minimised, in our words."""

    kind: str = "sigmoid"
    beta: float = 0.1
    smoothing: float = 0.0
    sft: float = 0.0


@dataclass(frozen=True)
class Trained:
    """What TRL gives: by step losses, norms before clipping and metrics; gradients of the first step, by our names."""

    folder: Path
    adapter: Arrays
    losses: list[float]
    norms: list[float]
    metrics: list[dict[str, float]]
    gradients: Arrays


@cache
def steps(vocab: int = SIZES.vocab) -> tuple[tuple[tuple[Pair, ...], ...], ...]:
    """Random pairs: for each step its micro-batches."""
    generator = numpy.random.default_rng(23)

    def drawn(sizes: tuple[int, ...]) -> Pair:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return {name: generator.integers(1, vocab, size).tolist() for name, size in zip(names, sizes, strict=True)}

    return tuple(tuple(tuple(drawn(sizes) for sizes in batch) for batch in PAIRS) for _ in range(STEPS))


def trl_settings(loss: Loss) -> dict[str, Any]:
    """The loss in TRL's words. Its sigmoid takes no smoothing; of a single pair, its sorting `aot` is the same loss."""
    kind = "aot" if loss.kind == "sigmoid" and loss.smoothing else loss.kind
    kinds, weights = ([kind, "sft"], [1.0, loss.sft]) if loss.sft else ([kind], None)
    return {"loss_type": kinds, "loss_weights": weights, "beta": loss.beta, "label_smoothing": loss.smoothing}


def make_trainer(loss: Loss, folder: Path) -> Any:
    """A DPOTrainer on the tiny model, in float64."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    write_tokenizer(folder)
    settings = DPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], max_length=None,
        **trl_settings(loss),
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "the", "chosen": "cat", "rejected": "red"}])
    lora = LoraConfig(r=SIZES.rank, lora_alpha=SIZES.alpha, target_modules=list(ADAPTED), lora_dropout=0.0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = in_double(build_model(False))
    trainer = DPOTrainer(model, args=settings, processing_class=tokenizer, train_dataset=rows, peft_config=lora)
    trainer.data_collator.pad_token_id = 0  # the tokenizer's own is beyond the tiny vocabulary
    return trainer


def make_expert_trainer(loss: Loss, folder: Path, name: str) -> Any:
    """A DPOTrainer on a model with experts, whose adapters peft puts on all experts; a second base is the reference.

    The balancing loss is another matter, and left out.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    write_tokenizer(folder)
    settings = DPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], max_length=None,
        router_aux_loss_coef=0.0, **trl_settings(loss),
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "the", "chosen": "cat", "rejected": "red"}])
    base, other = (in_double(moe_reference.build_model(name)) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = DPOTrainer(base, ref_model=other, args=settings, processing_class=tokenizer, train_dataset=rows)
    trainer.model = moe_reference.add_adapter(base)
    in_double(trainer.model)
    trainer.data_collator.pad_token_id = 0
    return trainer


def redraw_adapter(base: Any) -> None:
    """Every factor random, B too; q, k and v share one A as our fused layer does, gate and up too."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    for layer in base.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for follower, leader in ((attention.k_proj, attention.q_proj), (attention.v_proj, attention.q_proj)):
            follower.lora_A.default.weight = leader.lora_A.default.weight
        mlp.up_proj.lora_A.default.weight = mlp.gate_proj.lora_A.default.weight


def batch_loss(trainer: Any, pairs: Sequence[Pair], alone: bool) -> torch.Tensor:
    """TRL's loss of a micro-batch; `alone` for the mean over its pairs, each by itself."""
    groups = [[pair] for pair in pairs] if alone else [pairs]
    with InDouble():
        losses = [trainer.compute_loss(trainer.model, trainer.data_collator(list(group))) for group in groups]
    return sum(losses) / len(losses)


@cache
def trained(loss: Loss, model: str = "qwen3") -> Trained:
    """Train with TRL's loss; a step's loss is the mean over its micro-batches."""
    dense = model == "qwen3"
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(loss, Path(folder)) if dense else make_expert_trainer(loss, Path(folder), model)
    base = trainer.model.get_base_model()
    if dense:
        redraw_adapter(base)

    def named(gradients: bool) -> Arrays:
        return by_our_names(base, True, gradients) if dense else moe_reference.adapter_by_name(base, gradients)

    adapter = {name: value.astype("float32") for name, value in named(False).items()}
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = optimizer_of(parameters)
    folder = saved_model(False) if dense else moe_reference.saved_model(model)
    found = Trained(folder, adapter, [], [], [], {})
    trainer.model.train()
    for number, step in enumerate(steps(SIZES.vocab if dense else moe_reference.MOE_SIZES.vocab)):
        optimizer.zero_grad()
        trainer._metrics["train"].clear()
        value = sum(batch_loss(trainer, pairs, bool(loss.smoothing or loss.sft)) for pairs in step) / len(step)
        value.backward()
        if number == 0:
            found.gradients.update(named(True))
        found.metrics.append({name: float(numpy.mean(told)) for name, told in trainer._metrics["train"].items()})
        found.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        found.losses.append(value.item())
        optimizer.step()
    return found
