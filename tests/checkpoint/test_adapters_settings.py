"""Names of both worlds to modules, settings in args.json, and what contradicts an adapter."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.checkpoint.adapters.export import write_peft
from mindspeed_llm.checkpoint.adapters.servers import describe_servers
from mindspeed_llm.checkpoint.adapters.settings import (
    check_whole,
    chosen_parts,
    module_entries,
    settings_of,
    short_targets,
)
from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.metadata import BaseRecord, LoraSettings, Metadata, read_metadata, write_metadata
from mindspeed_llm.checkpoint.open import check_base, open_lora
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.errors import InputError, UsageError
from tests.checkpoint.peft_tiny import adapt, qwen3
from tests.checkpoint.tiny import TARGETS, random_adapter, write_adapter
from tests.models.tiny_moe import QWEN3_MOE
from tests.models.tiny_moe import saved as saved_moe

LAYER = "decoder.layers.1."


def targets(names: list[str], table: WeightTable) -> tuple[str, ...]:
    """What target names stand for, as settings spell it."""
    modules = module_entries(table)
    return short_targets(chosen_parts(names, modules, "--flag"), modules)


def test_settings_say_rank_and_alpha_of_every_module() -> None:
    patterns = {"rank_pattern": {"linear_qkv": 9, LAYER + "self_attention.linear_qkv": 2}, "alpha_pattern": {}}
    settings = LoraSettings(4, 8.0, ("linear_qkv", LAYER + "mlp.linear_fc1"), **patterns)
    assert settings.rank("decoder.layers.0.self_attention.linear_qkv") == 9
    assert settings.scaling(LAYER + "self_attention.linear_qkv") == 4.0
    assert settings.adapts(LAYER + "mlp.linear_fc1") and not settings.adapts("decoder.layers.2.mlp.linear_fc1")


def test_settings_survive_args_json_and_those_without_patterns_are_read(tmp_path: Path) -> None:
    config = HFSource(qwen3(tmp_path / "base")).config
    settings = LoraSettings(4, 8.0, ("linear_qkv",), 0.0, {"linear_qkv": 9}, {LAYER + "mlp.linear_fc1": 3.5})
    write_metadata(tmp_path, Metadata(config, Layout.even(3), lora=settings))
    assert read_metadata(tmp_path).lora == settings
    raw = json.loads((tmp_path / "args.json").read_text())
    raw["lora"] = {"r": 4, "alpha": 8.0, "target_modules": ["linear_qkv"], "dropout": 0.0}
    (tmp_path / "args.json").write_text(json.dumps(raw))
    assert read_metadata(tmp_path).lora == LoraSettings(4, 8.0, ("linear_qkv",))


def test_the_shortest_settings_give_every_module_its_own(tmp_path: Path) -> None:
    table = HFSource(qwen3(tmp_path / "base")).table
    ranks = {f"decoder.layers.{n}.mlp.linear_fc{k}": 4 for n in range(3) for k in (1, 2)}
    ranks |= {f"decoder.layers.{n}.self_attention.linear_qkv": 12 for n in range(3)}
    ranks[LAYER + "mlp.linear_fc2"] = 5
    del ranks["decoder.layers.0.mlp.linear_fc1"]
    settings = settings_of(ranks, dict.fromkeys(ranks, 2.0), table)
    assert settings.r == 4 and settings.rank_pattern == {"linear_qkv": 12, LAYER + "mlp.linear_fc2": 5}
    assert all(settings.rank(m) == ranks[m] and settings.scaling(m) == 2.0 for m in ranks)
    partly = (LAYER + "mlp.linear_fc1", "decoder.layers.2.mlp.linear_fc1")
    assert settings.target_modules == tuple(sorted((*partly, "linear_fc2", "linear_qkv")))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["linear_qkv", "linear_fc2"], ("linear_fc2", "linear_qkv")),
        (["q_proj", "k_proj", "v_proj"], ("linear_qkv",)),
        (["o_proj", "down_proj"], ("linear_fc2", "linear_proj")),
        (["all-linear"], tuple(sorted(TARGETS))),
        (["model.layers.1.mlp.down_proj"], (LAYER + "mlp.linear_fc2",)),
        ([LAYER + "mlp.linear_fc2", "layers.0.mlp.linear_fc2", "decoder.layers.2.mlp.linear_fc2"], ("linear_fc2",)),
    ],
)
def test_target_names_of_both_worlds_are_understood(names: list[str], expected: tuple, tmp_path: Path) -> None:
    assert targets(names, HFSource(qwen3(tmp_path / "base")).table) == expected


def test_targets_that_fit_nothing_are_refused_and_parts_of_a_layer_are_told(tmp_path: Path) -> None:
    modules = module_entries(HFSource(qwen3(tmp_path / "base")).table)
    with pytest.raises(UsageError, match="did you mean 'q_proj'"):
        chosen_parts(["q_pro"], modules, "--flag")
    found = chosen_parts(["q_proj", "v_proj", "layers.0.mlp.linear_fc1"], modules, "--flag")
    assert found["decoder.layers.1.self_attention.linear_qkv"] == {0, 2}
    assert found["decoder.layers.0.mlp.linear_fc1"] == {0, 1} and len(found) == 4
    with pytest.raises(
        UsageError, match="names q_proj v_proj, but q_proj k_proj v_proj are one layer .* and are saved"
    ):
        check_whole(found, modules, "--flag", "are saved")


def test_all_linear_means_the_experts_and_not_their_router() -> None:
    table = HFSource(saved_moe(QWEN3_MOE)).table
    assert targets(["all-linear"], table) == tuple(sorted(TARGETS))
    assert targets(["gate"], table) == targets(["all-router"], table) == ("router",)
    assert targets(["embed_tokens"], table) == targets(["all-embedding"], table) == ("word_embeddings",)


def test_flags_are_held_against_a_peft_adapter(tmp_path: Path) -> None:
    base = qwen3(tmp_path / "base")
    adapt(base, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    source = HFSource(base)
    open_lora(tmp_path / "adapter", 4, 8, ["q_proj", "down_proj"], base=source)
    open_lora(tmp_path / "adapter", 4, 8, ["linear_fc2", "self_attn.q_proj"], base=source)
    with pytest.raises(
        UsageError, match=r"says linear_fc2 linear_qkv, the adapter says linear_fc2 linear_qkv \(q_proj\)"
    ):
        open_lora(tmp_path / "adapter", target_modules=["linear_fc2", "linear_qkv"], base=source)
    with pytest.raises(UsageError, match="--lora-r says 8, the adapter says 4"):
        open_lora(tmp_path / "adapter", 8, base=source)
    with pytest.raises(UsageError, match="--lora-alpha says 9, the adapter says 8"):
        open_lora(tmp_path / "adapter", alpha=9, base=source)
    with pytest.raises(UsageError, match="--lora-target-modules says all-linear, the adapter says linear_fc2"):
        open_lora(tmp_path / "adapter", target_modules=["all-linear"], base=source)


def test_another_base_than_an_export_records_is_refused(tmp_path: Path) -> None:
    base, other = qwen3(tmp_path / "base"), qwen3(tmp_path / "other", dtype=torch.bfloat16)
    source = HFSource(base)
    adapt(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    lora = open_lora(tmp_path / "adapter", base=source)
    write_peft(lora, tmp_path / "exported", str(base), BaseRecord(str(base), content_hash(source)))
    check_base(open_lora(tmp_path / "exported", base=source), source, base)
    wrong = HFSource(other)
    with pytest.raises(InputError, match="trained on the base .*give that base"):
        check_base(open_lora(tmp_path / "exported", base=wrong), wrong, other)


def test_tensors_of_another_rank_than_recorded_are_refused(tmp_path: Path) -> None:
    source = HFSource(qwen3(tmp_path / "base"))
    settings = LoraSettings(3, 6.0, TARGETS, 0.0, {"linear_fc1": 5})
    folder = write_adapter(tmp_path / "l", source.table, random_adapter(source.table), Layout.even(3), settings)
    with pytest.raises(InputError, match="args.json says rank 5 for .*linear_fc1, the tensors have rank 3"):
        open_lora(folder)
    fewer = dataclasses.replace(settings, rank_pattern={}, target_modules=("linear_qkv",))
    folder = write_adapter(tmp_path / "m", source.table, random_adapter(source.table), Layout.even(3), fewer)
    with pytest.raises(InputError, match="args.json says no adapter for "):
        open_lora(folder)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias is True, which changes"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "a setting of the future": ({"use_magic": "much"}, "use_magic is 'much', which is unknown here"),
    "a changed base": ({"init_lora_weights": "pissa_niter_4"}, "a base that training changed"),
    "no rank": ({"r": 0}, "rank r is 0"),
    "another rank": ({"r": 5}, r"q_proj has A \[4, 24\] and B \[60, 4\]; .*rank 5"),
    "fewer targets": ({"target_modules": ["down_proj"]}, "does not target model.layers.0.self_attn.q_proj"),
    "more targets": ({"target_modules": ["q_proj", "o_proj"]}, "targets model.layers.0.self_attn.o_proj and 2 more"),
    "a broken pattern": ({"rank_pattern": {"(": 4}}, "is not a regular expression"),
    "dora without magnitudes": ({"use_dora": True}, "use_dora is True, but .* has no magnitude"),
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A small adapter on q_proj of rank 4, its base in `base` beside it."""
    adapt(qwen3(tmp_path / "base"), tmp_path / "adapter", r=4, target_modules=["q_proj"])
    return tmp_path / "adapter"


@pytest.mark.parametrize("what", BROKEN)
def test_settings_whose_effect_would_be_lost_are_refused(what: str, adapter: Path) -> None:
    changes, message = BROKEN[what]
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(InputError, match=message):
        open_lora(adapter, base=HFSource(adapter.parent / "base"))


def test_tensors_of_no_known_meaning_are_refused_by_name(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors, source = load_file(file), HFSource(adapter.parent / "base")
    key = next(iter(tensors))
    for extra, message in (
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "lora_B.bias is no tensor of a LoRA adapter"),
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", "layers.7.self_attn.q_proj is unknown"),
        ("base_model.model.model.elsewhere.weight", "model.elsewhere.weight is unknown to a qwen3 model"),
        ("base_model.model.model.layers.0.self_attn.o_proj.weight", r"o_proj.weight has shape \[3\], the base has"),
    ):
        save_file({**tensors, extra: torch.ones(3)}, file)
        with pytest.raises(InputError, match=message):
            open_lora(adapter, base=source)
    save_file({name: values for name, values in tensors.items() if name != key}, file)
    with pytest.raises(InputError, match="a pair of lora_A and lora_B is expected"):
        open_lora(adapter, base=source)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match="truncated"):
        open_lora(adapter, base=source)


@pytest.mark.parametrize("form", ["adapter name", "no prefix", "bin", "saved as bin with strides"])
def test_other_spellings_and_files_hold_the_same_adapter(form: str, adapter: Path) -> None:
    source = HFSource(adapter.parent / "base")
    first = open_lora(adapter, base=source)
    expected = {name: first.tensors.read(name) for name in first.tensors.names()}
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    if form == "adapter name":
        tensors = {name.replace(".weight", ".default.weight"): values for name, values in tensors.items()}
    if form == "no prefix":
        tensors = {name.removeprefix("base_model.model."): values for name, values in tensors.items()}
    file.unlink()
    if form in ("adapter name", "no prefix"):
        save_file(tensors, file)
    else:
        turned = {name: values.t().contiguous().t() for name, values in tensors.items()}
        torch.save(tensors if form == "bin" else turned, adapter / "adapter_model.bin")
    found = open_lora(adapter, base=source)
    assert found.settings == first.settings and found.tensors.names() == list(expected)
    assert all(torch.equal(found.tensors.read(name), values) for name, values in expected.items())


def test_parts_at_ratios_of_two_keep_their_type_and_others_are_raised(tmp_path: Path) -> None:
    base = qwen3(tmp_path / "base", dtype=torch.bfloat16)
    source = HFSource(base)
    module = "decoder.layers.0.self_attention.linear_qkv.lora_B.weight"
    for folder, alpha, dtype in (("two", 16, torch.bfloat16), ("three", 24, torch.float32)):
        targets = ["q_proj", "k_proj", "v_proj"]
        adapt(base, tmp_path / folder, r=4, lora_alpha=8, target_modules=targets, alpha_pattern={"k_proj": alpha})
        assert open_lora(tmp_path / folder, base=source).tensors.dtype(module) == dtype


def test_the_line_on_servers_follows_from_the_config() -> None:
    plain = {"r": 12, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "target_modules": ["q_proj"]}
    assert "--max-lora-rank 16)" in describe_servers(plain)
    assert "not for vLLM and SGLang, which take no modules_to_save (lm_head)" in describe_servers(
        {**plain, "modules_to_save": ["lm_head"]}
    )
    assert "of rank 20" in describe_servers({**plain, "rank_pattern": {"q_proj": 20}})
    assert "one rank and alpha" in describe_servers({**plain, "rank_pattern": {"q_proj": 20}})
    assert "experts" in describe_servers({**plain, "target_modules": ["mlp.experts.0.up_proj"]})
