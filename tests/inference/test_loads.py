"""Whatever `--load` and `--lora-load` name: training and inference compute what transformers or peft does with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.peft_tiny import TOKENS, adapt, load, logits, same_logits
from tests.checkpoint.test_adapters_import import SHAPES
from tests.distributed.pool import pool
from tests.evaluation.test_program import quiz
from tests.fixtures import done, hf_model, launch, losses, once, refused, scratch, training
from tests.inference import live_tasks

TP_PP = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
LIVE = ["every linear layer", "some parts", "some layers", "rslora", "patterns", "dora", "saved norms"]
ENDS = ["embedding and head", "saved ends", "tokens"]
MERGED = [*ENDS, "biases", "dora of some"]


def live_logits(size: int, *argv: object) -> torch.Tensor:
    """Logits [rows, vocabulary] behind the fixed tokens, of the model an inference.py command line opens."""
    words = [str(word) for word in (*argv, "--tokenizer-name-or-path", hf_model())]
    ranks = pool(size).run(live_tasks.logits, argv=words, prompts=TOKENS.tolist())
    found = [torch.stack([torch.from_numpy(row) for row in rank]) for rank in ranks]
    assert all(torch.equal(one, found[0]) for one in found)
    return found[0]


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "layout"), [(1, ()), (4, TP_PP)])
@pytest.mark.parametrize(
    ("shape", "tied"), [*((one, False) for one in (*LIVE, *MERGED)), *((one, True) for one in ENDS)]
)
def test_a_model_answers_with_a_peft_adapter_as_peft_does(
    shape: str, tied: bool, size: int, layout: tuple[Any, ...], tmp_path: Path
) -> None:
    base = hf_model(tied=tied)
    expected = adapt(base, tmp_path / "adapter", **SHAPES[shape])
    found = live_logits(size, "--load", base, "--lora-load", tmp_path / "adapter", *layout)
    same_logits(found, expected[:, -1])


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "layout"), [(1, ()), (4, TP_PP)])
@pytest.mark.parametrize("shape", LIVE)
def test_training_starts_from_a_peft_adapter_and_gives_it_back(
    shape: str, size: int, layout: tuple[Any, ...], tmp_path: Path
) -> None:
    """At a learning rate of zero."""
    from peft import PeftModel

    expected = adapt(hf_model(), tmp_path / "adapter", **SHAPES[shape])
    start = ("--finetune", "--lora-load", tmp_path / "adapter", "--lr", 0, "--min-lr", 0, "--save-safetensors")
    run = training(tmp_path / "run", *layout, *start, lora=False, steps=3)
    done(launch(size, "posttrain_gpt.py", run))
    given_back = PeftModel.from_pretrained(load(hf_model()), tmp_path / "run" / "iter_0000003" / "peft")
    same_logits(logits(given_back), expected)


def test_training_a_peft_adapter_further_changes_it(tmp_path: Path) -> None:
    before = adapt(hf_model(), tmp_path / "adapter", **SHAPES["every linear layer"])
    start = ("--finetune", "--lora-load", tmp_path / "adapter")
    done(launch(1, "posttrain_gpt.py", training(tmp_path / "run", *start, lora=False, steps=3)))
    after = live_logits(1, "--load", hf_model(), "--lora-load", tmp_path / "run")
    assert (after - before[:, -1]).abs().max() > 0.05


def test_training_refuses_a_peft_adapter_that_its_checkpoints_cannot_hold(tmp_path: Path) -> None:
    adapt(hf_model(), tmp_path / "adapter", **SHAPES["tokens"])
    argv = training(tmp_path / "run", "--finetune", "--lora-load", tmp_path / "adapter", lora=False)
    refused(launch(1, "posttrain_gpt.py", argv), 1, "training cannot go on from the whole tensor", "merge the adapter")


def test_flags_that_contradict_a_peft_adapter_are_refused(tmp_path: Path) -> None:
    adapt(hf_model(), tmp_path / "adapter", **SHAPES["every linear layer"])
    argv = training(tmp_path / "run", "--lora-load", tmp_path / "adapter", "--lora-r", 8, lora=False)
    refused(launch(1, "posttrain_gpt.py", argv), 2, "--lora-r says 8, the adapter says 4")


@once
def torch_dist() -> Path:
    """The tiny model in megatron-core's reshardable format."""
    folder = scratch() / "torch_dist"
    argv = ["--load-model-type", "hf", "--save-model-type", "mg", "--ckpt-format", "torch_dist"]
    done(launch(1, "convert_ckpt.py", [*argv, "--load-dir", hf_model(), "--save-dir", folder]))
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "layout"), [(1, ()), (4, TP_PP)])
def test_a_torch_dist_folder_answers_as_transformers_does(size: int, layout: tuple[Any, ...]) -> None:
    same_logits(live_logits(size, "--load", torch_dist(), *layout), logits(load(hf_model()))[:, -1])


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "layout"), [(1, ()), (4, TP_PP)])
def test_training_from_a_torch_dist_folder_is_training_from_the_hf_folder(
    size: int, layout: tuple[Any, ...], tmp_path: Path
) -> None:
    found = []
    for name, base in (("hf", hf_model()), ("dist", torch_dist())):
        done(launch(size, "posttrain_gpt.py", training(tmp_path / name, "--load", base, *layout, steps=3)))
        found.append(losses(tmp_path / name))
    assert found[0] == found[1] and len(found[0]) == 3


def test_evaluation_scores_a_peft_adapter_like_the_merged_model(tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapt(hf_model(), adapter, **SHAPES["rslora"])
    argv = ["--load-model-type", "hf", "--save-model-type", "hf", "--load-dir", hf_model(), "--lora-load", adapter]
    done(launch(1, "convert_ckpt.py", [*argv, "--save-dir", merged]))
    scores = []
    for named in ((hf_model(),), (merged,), (hf_model(), "--lora-load", adapter)):
        words = ["--task", "mmlu", "--task-data-path", quiz(tmp_path / "mmlu"), "--load", *named]
        done(launch(1, "evaluation.py", [*words, "--output-path", tmp_path / "scores.json"]))
        scores.append(json.loads((tmp_path / "scores.json").read_text())["results"]["mmlu"]["subjects"])
    assert scores[2] == scores[1] and scores[2] != scores[0]
