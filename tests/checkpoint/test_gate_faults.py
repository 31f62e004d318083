"""The gate fails what is wrong: each fault once in a finished file, once in a table used in both directions."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.tables import WeightTable
from tests.checkpoint.gate_models import SETTINGS, adapter, dense, gate, hf_folder, in_bfloat16, made, statuses
from tests.checkpoint.tiny import random_adapter

SPLIT = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)


def failed(report: dict) -> set[str]:
    """The checks that failed; the verdict says so, and so does the exit status."""
    found = {name for name, status in statuses(report).items() if status == "FAIL"}
    assert (report["verdict"], report["status"]) == (("FAIL", 1) if found else ("PASS", 0)), report["out"]
    return found


BIASED = {"attention_bias": True}
FILES = {
    "mg gate and up swapped": ("qwen3", (), {"weights", "logits"}),
    "mg query groups apart": ("qwen3", (), {"weights", "logits"}),
    "mg expert transposed": ("square", (), {"weights", "logits"}),
    "mg bias missing": ("biased", (), {"files"}),
    "mg bias zero": ("biased", (), {"weights", "values", "logits"}),
    "mg stale tied head": ("qwen2 tied", SPLIT, {"copies", "shares"}),
    "mg NaN": ("qwen3", (), {"weights", "values", "logits"}),
    "mg replica differs": ("qwen3", SPLIT, {"copies", "shares"}),
    "mg padding differs": ("qwen3", SPLIT, {"copies"}),
}


def model(name: str) -> Path:
    """The HF folder a fault is tried on."""
    if name == "biased":
        return dense("qwen3 biases", attention_bias=True)
    return hf_folder("gpt-oss-square" if name == "square" else name)


@pytest.mark.parametrize("fault", FILES)
def test_a_fault_in_rank_files_fails(fault: str, tmp_path: Path) -> None:
    name, layout, checks = FILES[fault]
    assert failed(gate(model(name), tmp_path / "mg", *layout, damage=fault)) == checks


def test_looking_again_at_an_undamaged_result_passes(tmp_path: Path) -> None:
    assert failed(gate(model("qwen3"), tmp_path / "mg", damage="nothing")) == set()


HF_FILES = {
    "hf gate and up swapped": ("qwen3", {"weights", "logits"}),
    "hf query heads moved": ("qwen3", {"weights", "logits"}),
    "hf expert transposed": ("square", {"weights", "logits"}),
    "hf bias missing": ("biased", {"files"}),
    "hf stale tied head": ("qwen2 tied", {"files"}),
    "hf zeros": ("qwen3", {"weights", "values", "logits"}),
    "hf one element": ("qwen3", {"weights", "logits"}),
}


@pytest.mark.parametrize("fault", HF_FILES)
def test_a_fault_in_an_hf_folder_fails(fault: str, tmp_path: Path) -> None:
    name, checks = HF_FILES[fault]
    mg = made(model(name), tmp_path / "mg")
    assert failed(gate(mg, tmp_path / "out", damage=fault)) == checks


TABLES = {
    "gate and up swapped": "qwen3",
    "query groups apart": "qwen3",
    "expert transposed": "square",
    "bias forgotten": "biased",
    "bias unknown": "biased",
    "head is the embedding": "qwen3",
}


@pytest.mark.parametrize("fault", TABLES)
def test_a_wrong_row_of_the_table_fails_although_a_round_trip_cancels_it(fault: str, tmp_path: Path) -> None:
    unknown = ("--ignore-unknown", "true")
    there = gate(model(TABLES[fault]), tmp_path / "mg", *unknown, table=fault)
    assert "logits" in failed(there)
    if fault in ("gate and up swapped", "query groups apart", "expert transposed"):
        assert failed(there) == {"logits"}, "the round trip cancels: the table of tensors shows nothing"


@pytest.mark.parametrize("fault", ["gate and up swapped", "query groups apart", "expert transposed"])
def test_a_wrong_row_of_the_table_fails_on_the_way_to_hf(fault: str, tmp_path: Path) -> None:
    right = made(model(TABLES[fault]), tmp_path / "mg")
    assert failed(gate(right, tmp_path / "hf", table=fault)) == {"logits"}


@pytest.mark.parametrize("fault", ["gated cut as column", "row cut as column"])
@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "deepseek-v2-lite"])
def test_shares_that_megatron_core_would_not_hold_fail_although_reading_them_back_cancels_it(
    name: str, fault: str, tmp_path: Path
) -> None:
    there = gate(hf_folder(name), tmp_path / "mg", *SPLIT[:2], table=fault)
    assert failed(there) == {"shares"}
    if fault == "gated cut as column":
        right = made(hf_folder(name), tmp_path / "right", *SPLIT[:2])
        assert failed(gate(right, tmp_path / "hf", table=fault)) == {"shares"}


def deltas(base: Path) -> dict[str, torch.Tensor]:
    """The exact deltas of the random adapter under HF names, float64."""
    table: WeightTable = HFSource(base).table
    factors = random_adapter(table, SETTINGS.r, SETTINGS.target_modules)
    found = {}
    for name, entry in table.entries.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in factors:
            a, b = (factors[f"{module}.{one}.weight"].double() for one in ("lora_A", "lora_B"))
            for part, hf in enumerate(entry.hf):
                rows: Ranges = entry.hf_map().part_ranges(part)
                chosen = torch.cat([b[start:stop] for start, stop in rows])
                found[hf.name] = SETTINGS.alpha / SETTINGS.r * (chosen @ a)
    return found


@pytest.mark.parametrize("source", ["hf", "mg"])
@pytest.mark.parametrize("fault", ["alpha too low", "delta rounded"])
def test_a_wrongly_merged_file_fails(fault: str, source: str, tmp_path: Path) -> None:
    hf = in_bfloat16(hf_folder("qwen3"), tmp_path / "hf")
    torch.save(deltas(hf), tmp_path / "deltas.pt")
    torch.save(load_file(hf / "model.safetensors"), tmp_path / "base.pt")
    base = hf if source == "hf" else made(hf, tmp_path / "mg")
    words = ("--lora-load", adapter(tmp_path / "lora", hf), "--save-model-type", "hf")
    assert "weights" in failed(gate(base, tmp_path / "out", *words, damage=f"hf {fault}"))


@pytest.mark.parametrize("route", ["hf mg", "mg hf", "mg mg", "hf hf"])
@pytest.mark.parametrize("fault", ["alpha wrong", "delta rounded"])
def test_a_wrong_merge_fails(fault: str, route: str, tmp_path: Path) -> None:
    hf = in_bfloat16(hf_folder("qwen3"), tmp_path / "hf")
    source, target = route.split()
    base = hf if source == "hf" else made(hf, tmp_path / "mg")
    words = ("--lora-load", adapter(tmp_path / "lora", hf), "--save-model-type", target)
    found = failed(gate(base, tmp_path / "out", *words, table=fault))
    assert {"weights", "source" if route == "hf hf" else "logits"} <= found


@pytest.mark.parametrize("fault", ["gate and up swapped", "query groups apart"])
def test_faults_are_found_layer_by_layer_and_the_layer_is_named(fault: str, tmp_path: Path) -> None:
    report = gate(model("qwen3"), tmp_path / "mg", "--max-memory", "1MB", table=fault)
    assert failed(report) == {"logits"} and report["networks"] == "layer by layer"
    worst = report["logits"][-1]
    assert worst["layer"] is not None and worst["layer_difference"] > worst["layer_allowed"]
