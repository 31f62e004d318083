"""Which bytes each rank reads when a model is loaded, and writes when it is exported: its own, and no more."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.pool import pool
from tests.fixtures import hf_model, once, scratch, tuned
from tests.models.tiny_moe import DEEPSEEK_V2_LITE, DEEPSEEK_V3_YARN, GPT_OSS, QWEN2_MOE, QWEN3_MOE, Tiny, saved

WORKER = "tests.training.export_worker:"
DENSE = {
    "TP2 PP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2 PP2 VPP2": (4, {"tensor": 2, "pipeline": 2, "layers_per_virtual_stage": 1}),
    "TP2 DP2": (4, {"tensor": 2}),
}
EXPERTS = {
    "EP2": (2, {"expert": 2}),
    "TP2 EP2 ETP1": (2, {"tensor": 2, "expert": 2, "expert_tensor": 1}),
    "TP2 EP2 DP2": (4, {"tensor": 2, "expert": 2}),
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an HF folder by name."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def nbytes(folder: Path, *words: str) -> int:
    """Bytes of an HF folder's tensors whose names hold one of the words; of all without words."""
    return sum(one.nbytes for name, one in tensors(folder).items() if not words or any(word in name for word in words))


@once
def wide() -> Path:
    """A Qwen3 whose row-parallel weights have rows of many pages."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=331, hidden_size=24, intermediate_size=16384, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=1024, tie_word_embeddings=False,
    )  # fmt: skip
    folder = scratch() / "wide"
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("tied", [False, True])
def test_all_ranks_together_read_the_file_once_and_what_is_replicated_again(tied: bool, name: str) -> None:
    """Replicated are norms over TP, a tied embedding over stages, all over DP; a row pads the odd vocabulary."""
    size, layout = DENSE[name]
    folder = hf_model(tied=tied)
    found = pool(size).run(WORKER + "read_bytes", folder=folder, **layout)
    stages = layout.get("pipeline", 1)
    row = 24 * 4
    once_read = nbytes(folder) + nbytes(folder, "norm") + row * (1 if tied else 2)
    if tied and stages > 1:
        once_read += nbytes(folder, "embed_tokens") + row
    replicas = size // (2 * stages)
    assert sum(rank["copied"] for rank in found) == once_read * replicas
    for rank in found:
        assert rank["copied"] == rank["own"]


@pytest.mark.distributed
def test_a_share_of_columns_touches_the_pages_of_its_own_columns() -> None:
    found = pool(2).run(WORKER + "read_bytes", folder=wide(), tensor=2)
    row_parallel = nbytes(wide(), "o_proj", "down_proj")
    for rank in found:
        assert rank["mapped"] == row_parallel // 2
        assert rank["touched"] <= rank["mapped"] * 1.2, "a row of 12 or 32 KiB has at most one page more than its bytes"
    assert sum(rank["touched"] for rank in found) < row_parallel * 1.2


@pytest.mark.distributed
@pytest.mark.parametrize("one", [QWEN3_MOE, GPT_OSS], ids=str)
@pytest.mark.parametrize("name", ["EP2", "TP2 EP2 ETP1"])
def test_ranks_read_their_own_experts_alone(one: Tiny, name: str) -> None:
    size, layout = EXPERTS[name]
    found = pool(size).run(WORKER + "read_bytes", folder=saved(one), **layout)
    experts = nbytes(saved(one), ".experts.")
    rest = nbytes(saved(one)) - experts
    for rank in found:
        assert rank["copied"] == rank["own"]
    total = sum(rank["copied"] for rank in found)
    if name == "EP2":
        assert total == experts + 2 * rest
    else:
        assert experts < total < experts + 2 * rest


@pytest.mark.distributed
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_written_by_one_rank_and_the_work_goes_round(tied: bool, name: str, tmp_path: Path) -> None:
    size, layout = DENSE[name]
    folder = hf_model(tied=tied)
    found = pool(size).run(WORKER + "exported", folder=folder, target=tmp_path, **layout)
    written = sorted(name for names, _ in found for name in names)
    assert len(set(written)) == len(written)
    assert max(len(names) for names, _ in found) <= 2 * min(len(names) for names, _ in found)
    largest = nbytes(folder, "embed_tokens") + 24 * 4
    assert all(held <= largest for _, held in found), "one tensor at a time"
    assert tensors(tmp_path / "hf").keys() == tensors(folder).keys()
    assert all(torch.equal(one, tensors(folder)[key]) for key, one in tensors(tmp_path / "hf").items())


@pytest.mark.distributed
@pytest.mark.parametrize("one", [QWEN3_MOE, QWEN2_MOE, DEEPSEEK_V2_LITE, DEEPSEEK_V3_YARN, GPT_OSS], ids=str)
@pytest.mark.parametrize("name", EXPERTS)
def test_a_model_with_experts_is_exported_bit_for_bit(one: Tiny, name: str, tmp_path: Path) -> None:
    size, layout = EXPERTS[name]
    pool(size).run(WORKER + "exported", folder=saved(one), target=tmp_path, **layout)
    found, wanted = tensors(tmp_path / "hf"), tensors(saved(one))
    assert found.keys() == wanted.keys()
    assert [key for key in found if not torch.equal(found[key], wanted[key])] == []


@pytest.mark.distributed
def test_what_stays_float32_in_a_bf16_model_stays_so_in_its_export(tmp_path: Path) -> None:
    """The rank that lays out the files holds none of these tensors; it has to know their type all the same."""
    layout: dict[str, Any] = {"pipeline": 3, "dtype": torch.bfloat16}
    pool(3).run(WORKER + "exported", folder=saved(DEEPSEEK_V3_YARN), target=tmp_path, **layout)
    found, wanted = tensors(tmp_path / "hf"), tensors(saved(DEEPSEEK_V3_YARN))
    for key, one in found.items():
        dtype = torch.float32 if key.endswith("e_score_correction_bias") else torch.bfloat16
        assert one.dtype == dtype and torch.equal(one, wanted[key].to(dtype)), key
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.distributed
def test_one_rank_alone_reads_the_base_to_know_that_the_adapter_belongs_to_it() -> None:
    argv = ["--load", str(hf_model()), "--lora-load", str(tuned()), "--tensor-model-parallel-size", "2"]
    found = pool(2).run(WORKER + "read_while_opened", argv=argv)
    assert found == [nbytes(hf_model()), 0]
