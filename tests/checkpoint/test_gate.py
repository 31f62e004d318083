"""The gate passes what is right: every family, every direction, merges, casts, and with little memory."""

from pathlib import Path

import pytest

from tests.checkpoint.gate_models import FAMILIES, adapter, dense, gate, hf_folder, in_bfloat16, made, statuses

SPLIT = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_right_conversion_of_every_family_passes_in_both_directions(name: str, tmp_path: Path) -> None:
    there = gate(hf_folder(name), tmp_path / "mg")
    back = gate(tmp_path / "mg", tmp_path / "hf")
    for report in (there, back):
        assert report["status"] == 0 and report["verdict"] == "PASS", report["out"]
        assert {"weights", "values", "logits"} <= set(statuses(report))
        assert all(one["std"] > 0.5 for one in report["logits"])
        assert all(row["verdict"] == "equal" for row in report["tensors"])


@pytest.mark.parametrize("name", ["qwen3", "qwen2 tied", "gpt-oss", "deepseek-v3-yarn"])
def test_a_result_spread_over_ranks_or_in_torch_dist_passes(name: str, tmp_path: Path) -> None:
    split = [*SPLIT[:2], "--make-vocab-size-divisible-by", 8]
    if name.startswith("q"):
        split = [*split, *SPLIT[2:], "--num-layers-per-virtual-pipeline-stage", 1]
    spread = gate(hf_folder(name), tmp_path / "mg", *split)
    assert spread["status"] == 0 and statuses(spread)["copies"] == "PASS", spread["out"]
    looked = next(check["detail"] for check in spread["checks"] if check["name"] == "copies")
    assert int(looked.split()[0]) > 4
    again = gate(tmp_path / "mg", tmp_path / "dist", "--save-model-type", "mg", "--ckpt-format", "torch_dist")
    assert again["status"] == 0 and again["hf_folder"] == str(hf_folder(name)), again["out"]


@pytest.mark.parametrize("target", ["mg", "hf"])
def test_a_cast_is_held_against_the_source_rounded_once(target: str, tmp_path: Path) -> None:
    report = gate(hf_folder("qwen3"), tmp_path / "out", "--params-dtype", "bf16", "--save-model-type", target)
    assert report["status"] == 0, report["out"]
    assert {row["dtype"] for row in report["tensors"]} == {"bfloat16"}
    back = gate(tmp_path / "out", tmp_path / "wide", "--params-dtype", "fp32", "--save-model-type", "hf")
    assert back["status"] == 0 and {row["dtype"] for row in back["tensors"]} == {"float32"}, back["out"]


@pytest.mark.parametrize("route", ["hf hf", "hf mg", "mg hf", "mg mg"])
@pytest.mark.parametrize("name", ["qwen3", "deepseek-v2-lite"])
def test_a_merge_is_held_against_the_exact_sum_and_the_unmerged_adapter(name: str, route: str, tmp_path: Path) -> None:
    hf = in_bfloat16(hf_folder(name), tmp_path / "hf")
    lora = adapter(tmp_path / "lora", hf)
    source, target = route.split()
    base = hf if source == "hf" else made(hf, tmp_path / "mg")
    report = gate(base, tmp_path / "out", "--lora-load", lora, "--save-model-type", target)
    assert report["status"] == 0 and statuses(report)["adapter"] == "PASS", report["out"]
    assert {row["verdict"] for row in report["tensors"]} <= {"equal", "rounded"}


def test_without_an_hf_folder_of_these_weights_the_verdict_is_partial(tmp_path: Path) -> None:
    hf = in_bfloat16(hf_folder("qwen3"), tmp_path / "hf")
    made(hf, tmp_path / "merged", "--lora-load", adapter(tmp_path / "lora", hf))
    report = gate(tmp_path / "merged", tmp_path / "again", "--save-model-type", "mg", *SPLIT)
    assert report["verdict"] == "PARTIAL" and report["status"] == 1
    assert statuses(report) == {
        "weights": "PASS", "values": "PASS", "copies": "PASS", "shares": "PASS", "logits": "PASS",
        "transformers": "SKIPPED",
    }  # fmt: skip
    assert "holds other weights" in report["checks"][-1]["detail"]


def test_the_report_says_what_was_compared_and_how(tmp_path: Path) -> None:
    report = gate(hf_folder("qwen3"), tmp_path / "mg", *SPLIT)
    assert report["source"] == str(hf_folder("qwen3")) and report["tokens"] == 64 and report["networks"] == "whole"
    assert report["versions"]["transformers"] and report["peak_bytes"] > 10**8 and report["seconds"] > 0
    assert len(report["tensors"]) == 47 and report["logits"][0]["dtype"] == "float32"
    assert report["out"].rstrip().splitlines()[-1].startswith("precision: PASS")


def test_the_text_is_made_into_tokens_by_the_folders_own_tokenizer(tmp_path: Path) -> None:
    from mindspeed_llm.checkpoint.verify.text import LENGTH, TEXT, read_tokens
    from tests.fixtures import write_tokenizer

    (folder := tmp_path / "model").mkdir()
    write_tokenizer(folder)
    found = read_tokens([None, tmp_path, folder], 10**6, 10**4)
    assert found.origin == f"tokenizer of {folder}" and found.ids.shape[1] <= LENGTH
    assert read_tokens([tmp_path], 61, 64).ids.tolist() == [[byte % 61 for byte in TEXT.encode()[:64]]]


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen2 tied", "gemma2", "gemma3", "internlm2 biases", "mixtral", "gpt-oss", "deepseek-v3-yarn"]
)
def test_layer_by_layer_says_the_same_as_whole(name: str, tmp_path: Path) -> None:
    small = gate(hf_folder(name), tmp_path / "mg", "--max-memory", "1MB")
    whole = gate(hf_folder(name), tmp_path / "whole")
    assert (small["networks"], whole["networks"]) == ("layer by layer", "whole")
    assert small["verdict"] == "PASS" and small["logits"] == whole["logits"] and small["tensors"] == whole["tensors"]


def test_a_merge_is_judged_layer_by_layer_too(tmp_path: Path) -> None:
    hf = in_bfloat16(dense("qwen3 tied bias", tie_word_embeddings=True, attention_bias=True), tmp_path / "hf")
    words = ["--lora-load", adapter(tmp_path / "lora", hf), "--save-model-type", "hf"]
    small = gate(hf, tmp_path / "one", *words, "--max-memory", "1MB")
    whole = gate(hf, tmp_path / "two", *words)
    assert small["networks"] == "layer by layer" and small["status"] == 0, small["out"]
    assert small["logits"] == whole["logits"] and statuses(small)["adapter"] == "PASS"
