"""What is exported as a PEFT folder peft loads whole, and it computes the same; read again, it is the same bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from mindspeed_llm.checkpoint.adapters.export import write_peft
from mindspeed_llm.checkpoint.adapters.factors import AdapterTensors
from mindspeed_llm.checkpoint.adapters.settings import settings_of
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.lazy import InMemory
from mindspeed_llm.checkpoint.merge import MergedSource
from mindspeed_llm.checkpoint.open import open_lora
from tests.checkpoint.peft_tiny import adapt, load, logits, qwen3, same_logits, transformers_of
from tests.checkpoint.test_adapters_import import ENDS, EXPERTS, FUSED, SHAPES, TIED
from tests.checkpoint.tiny import random_adapter
from tests.models import parity
from tests.models.tiny_moe import DEEPSEEK_V3, QWEN2_MOE, WITHOUT_LATENT
from tests.models.tiny_moe import saved as saved_moe

LINEAR = (
    "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2",
    "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj",
)  # fmt: skip
NOT_EXPORTED = ("parameters",)
FOLDED = ("patterns",)
"""Shapes whose q, k and v or gate and up have scalings at ratios that are no powers of two."""


def loaded(base: Path, folder: Path) -> torch.Tensor:
    """The logits peft gives with a folder; it must find every tensor, and have a place for each."""
    found, load_adapter = [], PeftModel.load_adapter

    def watched(*args: Any, **kwargs: Any) -> Any:
        found.append(load_adapter(*args, **kwargs))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "load_adapter", watched)
        model = PeftModel.from_pretrained(load(base), folder, autocast_adapter_dtype=False)
    assert not found[0].missing_keys and not found[0].unexpected_keys, found[0]
    return logits(model)


def same_adapter(one: LoraSource, other: LoraSource) -> None:
    """Equal bit for bit, settings included."""
    assert one.settings == other.settings and one.unties == other.unties
    assert one.tensors.names() == other.tensors.names()
    for name in one.tensors.names():
        assert one.tensors.dtype(name) == other.tensors.dtype(name)
        assert torch.equal(one.tensors.read(name), other.tensors.read(name)), name


@pytest.mark.parametrize(
    ("shape", "tied"),
    [(shape, False) for shape in SHAPES if shape not in NOT_EXPORTED] + [(shape, True) for shape in (*ENDS, *TIED)],
)
def test_peft_computes_the_same_with_an_exported_adapter(shape: str, tied: bool, tmp_path: Path) -> None:
    base = qwen3(tmp_path / "base", tied)
    expected = adapt(base, tmp_path / "first", **{**SHAPES, **TIED}[shape])
    source = HFSource(base)
    first = open_lora(tmp_path / "first", base=source)
    write_peft(first, tmp_path / "second", str(base))
    same_logits(loaded(base, tmp_path / "second"), expected)
    if shape not in FOLDED:
        same_adapter(open_lora(tmp_path / "second", base=source), first)


@pytest.mark.parametrize("family", FUSED)
def test_fused_layers_are_exported_as_they_lie_in_the_model(family: str, tmp_path: Path) -> None:
    base = parity.folder(FUSED[family])
    expected = adapt(base, tmp_path / "first", r=3, lora_alpha=7, target_modules="all-linear")
    source = HFSource(base)
    first = open_lora(tmp_path / "first", base=source)
    write_peft(first, tmp_path / "second", str(base))
    same_logits(loaded(base, tmp_path / "second"), expected)
    same_adapter(open_lora(tmp_path / "second", base=source), first)


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("ranks", ["alike", "of experts alone", "doubled"])
def test_experts_are_exported_one_by_one(family: str, ranks: str, tmp_path: Path) -> None:
    base = saved_moe(EXPERTS[family])
    source = HFSource(base)
    patterns: dict[str, Any] = {}
    if ranks == "doubled":
        patterns = {"rank_pattern": {"gate_up_proj": 6}, "alpha_pattern": {"gate_up_proj": 14}}
    modules = [] if ranks == "of experts alone" else ["o_proj"]
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    settings = {"r": 3, "lora_alpha": 7, "target_modules": modules, "target_parameters": parameters, **patterns}
    expected = adapt(base, tmp_path / "first", **settings)
    first = open_lora(tmp_path / "first", base=source)
    write_peft(first, tmp_path / "second", str(base))
    same_logits(loaded(base, tmp_path / "second"), expected)
    same_adapter(open_lora(tmp_path / "second", base=source), first)


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("with_experts", [False, True])
def test_routers_are_exported_as_parameters(family: str, with_experts: bool, tmp_path: Path) -> None:
    base = saved_moe(EXPERTS[family])
    source = HFSource(base)
    parameters = ["mlp.router.weight" if family == "gpt-oss" else "mlp.gate.weight"]
    parameters += ["experts.gate_up_proj", "experts.down_proj"] if with_experts else []
    modules = ["embed_tokens", "o_proj"] if with_experts else []
    settings = {"r": 3, "lora_alpha": 7, "target_modules": modules, "target_parameters": parameters}
    expected = adapt(base, tmp_path / "first", **settings)
    first = open_lora(tmp_path / "first", base=source)
    assert "router" in first.settings.target_modules
    first = replace(first, settings=replace(first.settings, dropout=0.1))  # peft loads no parameters with dropout
    write_peft(first, tmp_path / "second", str(base))
    same_logits(loaded(base, tmp_path / "second"), expected)
    same_logits(logits(transformers_of(MergedSource(source, first), base, tmp_path / "merged")), expected)


MIXED = {
    "dense layers first": DEEPSEEK_V3,
    "shared experts": QWEN2_MOE,
    "a dense layer between": next(one for one in WITHOUT_LATENT if one.name == "qwen3-moe-mlp-only"),
}


@pytest.mark.parametrize("what", ["everything", "dense layers only"])
@pytest.mark.parametrize("family", MIXED)
def test_layers_named_like_experts_are_not_taken_for_them(family: str, what: str, tmp_path: Path) -> None:
    """peft with transformers 5 takes every target that ends in gate_proj for the experts of all layers."""
    base = saved_moe(MIXED[family])
    source = HFSource(base)
    factors = random_adapter(source.table, targets=LINEAR)
    if what != "everything":
        factors = {name: values for name, values in factors.items() if ".local_experts." not in name}
    ranks = {name.partition(".lora_")[0]: 3 for name in factors}
    settings = settings_of(ranks, dict.fromkeys(ranks, 2.5), source.table)
    tensors = AdapterTensors(tmp_path, source.table, {name: InMemory(values * 0.5) for name, values in factors.items()})
    lora = LoraSource(tensors, settings, None, None, None)
    write_peft(lora, tmp_path / "adapter", str(base))
    expected = logits(transformers_of(MergedSource(source, lora), base, tmp_path / "merged"))
    same_logits(loaded(base, tmp_path / "adapter"), expected)
    same_adapter(open_lora(tmp_path / "adapter", base=source), lora)
