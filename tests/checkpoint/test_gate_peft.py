"""The gate on PEFT adapters: what peft itself computes is the truth, for merges and for adapters converted alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.gate_models import adapter, dense, gate, hf_folder, in_bfloat16, made, statuses

EVERY_LINEAR = {"target_modules": "all-linear", "r": 3, "lora_alpha": 7}
KINDS: dict[str, dict[str, Any]] = {
    "all linear layers": EVERY_LINEAR,
    "q and v, patterns, rslora": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 11},
    },
    "DoRA": {**EVERY_LINEAR, "use_dora": True},
    "a head of its own": {**EVERY_LINEAR, "modules_to_save": ["lm_head"]},
}


def peft_folder(target: Path, base: Path, **settings: Any) -> Path:
    """A PEFT adapter of `base` with random values, as peft saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                one.copy_(0.15 * torch.randn(one.shape, generator=generator))
            elif "modules_to_save" in name or "magnitude" in name:
                one.mul_(1 + 0.1 * torch.randn(one.shape, generator=generator))
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize("route", ["hf mg", "mg hf", "hf hf"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_peft_adapter_is_held_against_pefts_own_merge(kind: str, route: str, tmp_path: Path) -> None:
    tied = dense("qwen3 tied", tie_word_embeddings=True)
    hf = in_bfloat16(tied if kind == "a head of its own" else hf_folder("qwen3"), tmp_path / "hf")
    source, target = route.split()
    base = hf if source == "hf" else made(hf, tmp_path / "mg")
    lora = peft_folder(tmp_path / "peft", hf, **KINDS[kind])
    report = gate(base, tmp_path / "out", "--lora-load", lora, "--save-model-type", target)
    assert report["status"] == 0, report["out"]
    checks = {"weights", "values", "logits", "source" if target == "hf" else "copies"}
    plain = kind in ("all linear layers", "q and v, patterns, rslora")
    assert set(statuses(report)) == (checks | {"adapter"} if plain else checks)


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_factors_on_blocks_of_experts_are_merged_as_peft_does(name: str, tmp_path: Path) -> None:
    hf = in_bfloat16(hf_folder(name), tmp_path / "hf")
    blocks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = {"target_modules": ["q_proj"], "target_parameters": blocks, "r": 2, "lora_alpha": 3}
    report = gate(hf, tmp_path / "out", "--lora-load", peft_folder(tmp_path / "peft", hf, **settings))
    assert report["status"] == 0, report["out"]


def test_adapters_of_both_kinds_are_added_with_their_weights(tmp_path: Path) -> None:
    hf = in_bfloat16(hf_folder("qwen3"), tmp_path / "hf")
    loras = [peft_folder(tmp_path / "peft", hf, **EVERY_LINEAR), adapter(tmp_path / "lora", hf)]
    words = ["--lora-load", *loras, "--lora-weights", 0.7, -0.4, "--save-model-type", "hf"]
    report = gate(hf, tmp_path / "out", *words)
    assert report["status"] == 0 and statuses(report)["adapter"] == "PASS", report["out"]


@pytest.mark.parametrize("kind", ["all linear layers", "q and v, patterns, rslora"])
def test_an_adapter_alone_is_held_against_peft_in_both_directions(kind: str, tmp_path: Path) -> None:
    hf = hf_folder("qwen3")
    lora = peft_folder(tmp_path / "peft", hf, **KINDS[kind])
    there = gate(hf, tmp_path / "mg", "--lora-load", lora, "--merge-lora", "false", "--target-tensor-parallel-size", 2)
    assert there["status"] == 0 and statuses(there) == {"deltas": "PASS", "logits": "PASS"}, there["out"]
    words = ["--lora-load", tmp_path / "mg", "--save-model-type", "hf", "--save-lora-to-hf", "true"]
    back = gate(hf, tmp_path / "again", *words, "--merge-lora", "false")
    assert back["status"] == 0, back["out"]
    assert statuses(back) == {"deltas": "PASS", "adapter": "PASS", "logits": "PASS"}


def test_without_the_hf_folder_of_the_base_peft_cannot_judge_and_the_verdict_is_partial(tmp_path: Path) -> None:
    hf = in_bfloat16(hf_folder("qwen3"), tmp_path / "hf")
    merged = made(hf, tmp_path / "merged", "--lora-load", adapter(tmp_path / "lora", hf))
    lora = peft_folder(tmp_path / "peft", hf, **EVERY_LINEAR)
    report = gate(merged, tmp_path / "out", "--lora-load", lora, "--save-model-type", "mg")
    assert report["verdict"] == "PARTIAL" and statuses(report)["peft"] == "SKIPPED", report["out"]


@pytest.mark.parametrize("fault", ["alpha wrong", "delta rounded"])
def test_a_wrong_merge_of_a_peft_adapter_fails(fault: str, tmp_path: Path) -> None:
    hf = in_bfloat16(hf_folder("qwen3"), tmp_path / "hf")
    lora = peft_folder(tmp_path / "peft", hf, **EVERY_LINEAR)
    report = gate(hf, tmp_path / "out", "--lora-load", lora, table=fault)
    assert {name for name, status in statuses(report).items() if status == "FAIL"} == {"weights", "logits"}
