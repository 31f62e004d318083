"""What is trained with LoRA options is saved, resumed, recorded, answered with, merged, exported and trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures import close, done, hf_model, launch, losses, refused, same, training, weights
from tests.training.test_export import assert_close, loaded, with_adapter

pytestmark = pytest.mark.distributed
TP_SP = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
PP = ("--pipeline-model-parallel-size", 2)
EVERY = ("--lora-target-modules", "all-linear")
PROMPT = [17 * place % 300 for place in range(20)]
NARROW = ("--lora-layers", 1, 2, "--lora-exclude-modules", "o_proj", "--lora-rank-pattern", "down_proj=2")
OPTIONS = {
    "DoRA, rsLoRA, patterns, layers; TP2 with sequence parallelism": (
        2,
        (*TP_SP, *EVERY, *NARROW, "--use-dora", "--use-rslora", "--lora-fusion"),
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"linear_fc2": 2}},
    ),
    "PiSSA and LoRA+; PP2": (
        2,
        (*PP, *EVERY, "--lora-init", "pissa", "--loraplus-lr-ratio", 4, "--lora-fusion", "--use-fused-mlp"),
        {"init": "pissa", "r": 3},
    ),
    "DoRA of q, v and up alone; TP2 with sequence parallelism": (
        2,
        (*TP_SP, "--lora-target-modules", "q_proj", "v_proj", "up_proj", "--use-dora"),
        {"parts": {"linear_fc1": ["up_proj"], "linear_qkv": ["q_proj", "v_proj"]}},
    ),
    "PiSSA of q alone": (
        1,
        ("--lora-target-modules", "q_proj", "o_proj", "--lora-init", "pissa", "--lora-fusion"),
        {"parts": {"linear_qkv": ["q_proj"]}},
    ),
    "DoRA and modules trained whole": (
        1,
        (*EVERY, "--use-dora", "--lora-modules-to-save", "embed_tokens", "lm_head", "input_layernorm"),
        {"modules_to_save": ["input_layernorm", "output_layer", "word_embeddings"]},
    ),
}


def run(size: int, *argv: object) -> str:
    return done(launch(size, "posttrain_gpt.py", argv)).out


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.tensor([PROMPT])).logits[0]


def live_logits(size: int, *argv: object) -> torch.Tensor:
    """What the live model of inference.py answers, base and adapter loaded apart."""
    from tests.distributed.pool import pool

    words = [str(word) for word in ("--load", hf_model(), *argv, "--prompt", "x")]
    found = pool(size).run("tests.inference.live_tasks:logits", argv=words, prompts=[PROMPT])
    return torch.as_tensor(found[0][0])


@pytest.mark.parametrize("name", OPTIONS)
def test_an_adapter_with_options_goes_all_the_way(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    size, options, recorded = OPTIONS[name]
    save, again = tmp_path / "run", tmp_path / "again"
    argv = ("--save-safetensors", *options, "--save-interval", 3)
    run(size, *training(save, *argv))
    settings = json.loads((save / "iter_0000006/args.json").read_text())["lora"]
    assert {key: settings[key] for key in recorded} == recorded

    again.mkdir()
    shutil.copytree(save / "iter_0000003", again / "iter_0000003")
    assert "resumed at step 3" in run(size, *training(again, *argv, "--auto-resume"))
    assert losses(again) == losses(save)[3:]
    same(weights(again), weights(save))

    exported = save / "iter_0000006" / "peft"
    if parts := recorded.get("parts"):
        targets = json.loads((exported / "adapter_config.json").read_text())["target_modules"]
        assert {name for name in targets if name != "o_proj"} == {name for own in parts.values() for name in own}
    adapted = logits(PeftModel.from_pretrained(loaded(hf_model()), exported).eval())
    assert (adapted - logits(loaded(hf_model()))).abs().max() > 0.1
    assert_close(logits(loaded(with_adapter(save))), adapted)
    assert_close(logits(loaded(with_adapter(exported, "--overwrite"))), adapted)
    layout = TP_SP[:2] if size == 2 else ()
    assert_close(live_logits(size, "--lora-load", save, *layout), adapted[-1])

    given = training(tmp_path / "next", "--finetune", "--lora-load", save, lora=False, steps=3)
    run(1, *given)
    given = training(tmp_path / "from_peft", "--finetune", "--lora-load", exported, lora=False, steps=3)
    run(1, *given)
    first, other = losses(tmp_path / "next"), losses(tmp_path / "from_peft")
    assert first[0] == pytest.approx(losses(save)[0], rel=0.5) and other[0] == pytest.approx(first[0], rel=1e-5)


def test_an_adapter_with_options_continues_at_another_layout_to_rounding(tmp_path: Path) -> None:
    save, again = tmp_path / "run", tmp_path / "again"
    options = (*EVERY, "--use-dora", "--lora-modules-to-save", "embed_tokens", "--load", hf_model(tied=True))
    argv = (*options, "--save-interval", 3)
    run(1, *training(save, *argv))
    again.mkdir()
    shutil.copytree(save / "iter_0000003", again / "iter_0000003")
    run(2, *training(again, *argv, *PP, "--auto-resume"))
    assert losses(again) == pytest.approx(losses(save)[3:], rel=1e-5)
    close(weights(again), weights(save), 1e-4)


def test_float32_adapters_on_a_bf16_base_resume_bit_for_bit(tmp_path: Path) -> None:
    save, again = tmp_path / "run", tmp_path / "again"
    argv = (*EVERY, "--load", hf_model(dtype="bfloat16"), "--bf16", "--lora-dtype", "float32", "--save-interval", 3)
    assert "modular form" in run(1, *training(save, *argv, "--lora-fusion"))
    stored = weights(save)
    assert {v.dtype for n, v in stored.items() if n.startswith("lora/")} == {torch.float32}
    again.mkdir()
    shutil.copytree(save / "iter_0000003", again / "iter_0000003")
    run(1, *training(again, *argv, "--lora-fusion", "--auto-resume"))
    assert losses(again) == losses(save)[3:]
    same(weights(again), stored)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--use-dora", "--lora-init", "pissa"), "exclude each other"),
        (("--lora-target-modules", "linear_fc3"), "'linear_fc3'; did you mean .*'linear_fc1'"),
        (("--lora-layers", 9), "--lora-layers 9: the model has the layers 0 to"),
    ],
)
def test_contradictions_are_refused_in_one_line(more: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    refused(launch(1, "posttrain_gpt.py", training(tmp_path / "run", *more)), 2, message)
