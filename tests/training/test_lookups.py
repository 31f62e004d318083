"""Adapters of routers and token embeddings are saved, resumed elsewhere, exported for peft, merged, trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import close, done, hf_model, launch, losses, training, weights
from tests.training.test_experts import moe_model
from tests.training.test_export import assert_close, loaded

pytestmark = pytest.mark.distributed
TP_SP = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
EP, PP = ("--expert-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)
PROMPT = [17 * place % 300 for place in range(20)]


class Run(NamedTuple):
    """A base, its targets, and the layouts of the run and of the one that goes on with it (of two processes each)."""

    base: Callable[[], Path]
    targets: tuple[str, ...]
    layout: tuple[object, ...]
    other: tuple[object, ...]


RUNS = {
    "tied embedding": Run(lambda: hf_model(tied=True), ("embed_tokens", "linear_proj"), TP_SP, PP),
    "routers and embedding": Run(
        moe_model, ("all-router", "all-embedding", "o_proj"), EP, (*TP_SP, *EP, "--expert-tensor-parallel-size", 1)
    ),
}


def run(*argv: object) -> str:
    return done(launch(2, "posttrain_gpt.py", argv)).out


def converted(base: Path, *more: object) -> Path:
    """What convert_ckpt.py makes of a base and `more`."""
    folder = Path(str(more[1])).parent / f"converted_{len(more)}_{Path(str(more[1])).name}"
    argv = ["--load-model-type", "hf", "--save-model-type", "hf", "--load-dir", base, "--save-dir", folder, *more]
    done(launch(1, "convert_ckpt.py", argv))
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    model.config._experts_implementation = "eager"  # the grouped product asks for other sizes
    return model(torch.tensor([PROMPT])).logits[0]


@pytest.mark.parametrize("name", RUNS)
def test_an_adapter_of_lookups_goes_all_the_way(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    from tests.distributed.pool import pool

    base, targets, layout, other = RUNS[name][0](), *RUNS[name][1:]
    save, again = tmp_path / "run", tmp_path / "again"
    start = ("--load", base, "--adam-eps", 1e-4)
    argv = (*start, "--lora-target-modules", *targets, "--save-interval", 3, "--save-safetensors")
    run(*training(save, *argv, *layout, "--lora-ckpt-filter", "false"))
    again.mkdir()
    shutil.copytree(save / "iter_0000003", again / "iter_0000003")
    assert "resumed at step 3" in run(*training(again, *argv, *other, "--auto-resume"))
    assert losses(again) == pytest.approx(losses(save)[3:], rel=1e-5)
    close(weights(again), weights(save), 1e-4)

    exported, before = save / "iter_0000006" / "peft", logits(loaded(base))
    adapted = logits(PeftModel.from_pretrained(loaded(base), exported).eval())
    assert (adapted - before).abs().max() > 0.1
    stored = load_file(exported / "adapter_model.safetensors")
    assert stored["base_model.model.model.embed_tokens.lora_embedding_A"].any()
    routers = [values.any() for key, values in stored.items() if "mlp.gate.lora_" in key]
    assert all(routers) and bool(routers) == ("routers" in name)
    for merged in (
        save / "iter_0000006/hf",
        converted(base, "--lora-load", save),
        converted(base, "--lora-load", exported),
    ):
        assert_close(logits(loaded(merged)), adapted)
        assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    words = [str(word) for word in ("--load", base, "--lora-load", save, *layout[:2], "--prompt", "x")]
    live = pool(2).run("tests.inference.live_tasks:logits", argv=words, prompts=[PROMPT])
    assert_close(torch.as_tensor(live[0][0]), adapted[-1])

    for number, source in enumerate((save, exported)):
        given = (*start, "--finetune", "--lora-load", source)
        run(*training(tmp_path / f"next{number}", *given, *layout, lora=False, steps=3))
    assert losses(tmp_path / "next1") == pytest.approx(losses(tmp_path / "next0"), rel=1e-5)
