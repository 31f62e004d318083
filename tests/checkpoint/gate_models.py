"""The tiny models the gate is tried on, and adapters for them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.metadata import BaseRecord, LoraSettings
from tests.checkpoint.tiny import TARGETS, random_adapter, write_adapter
from tests.distributed.pool import pool
from tests.models.families import DENSE
from tests.models.parity import Tiny, folder
from tests.models.tiny_moe import ATTENTION, EVERY, saved, tiny

SQUARE = tiny(
    "gpt-oss-square", "GptOssConfig", ATTENTION, intermediate_size=40, num_local_experts=4, num_experts_per_tok=2
)
"""Experts whose down projection is square, so that a transposed one has the right shape."""
FAMILIES = (
    "qwen3", "qwen2 tied", "llama 3.1", "mistral window", "gemma2", "gemma3", "glm4", "phi3 longrope beyond",
    "seed-oss all biases", "internlm2 biases", "internlm3 biases, dynamic", "qwen3-moe", "qwen2-moe", "mixtral",
    "glm4-moe", "gpt-oss", "deepseek-v3-yarn", "deepseek-v2",
)  # fmt: skip
"""One tiny model of each family."""
SETTINGS = LoraSettings(3, 7.0, TARGETS)


def hf_folder(name: str) -> Path:
    """The HF folder of a tiny model, in float32."""
    dense = {one.name: one for one in DENSE}
    return folder(dense[name]) if name in dense else saved({one.name: one for one in (*EVERY, SQUARE)}[name])


def dense(name: str, config: str = "Qwen3Config", **options: Any) -> Path:
    """The HF folder of a tiny dense model of these options."""
    return folder(Tiny(name, config, options))


def in_bfloat16(source: Path, target: Path) -> Path:
    """The same model in bfloat16."""
    target.mkdir(parents=True)
    tensors = {name: one.to(torch.bfloat16) for name, one in load_file(source / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return target


def adapter(target: Path, base: Path, settings: LoraSettings = SETTINGS) -> Path:
    """A Megatron LoRA checkpoint trained on `base`."""
    source = HFSource(base)
    factors = random_adapter(source.table, settings.r, settings.target_modules)
    record = BaseRecord(str(base), content_hash(source))
    return write_adapter(
        target, source.table, factors, Layout.even(source.config.num_layers, 1, 1), settings, base=record
    )


def gate(load: Path, save: Path, *more: object, damage: str = "", table: str = "") -> dict[str, Any]:
    """A conversion with the gate on, in a process of its own; see `gate_worker.convert`."""
    words = [str(word) for word in ("--load-dir", load, "--save-dir", save, *more)]
    (found,) = pool(1).run("tests.checkpoint.gate_worker:convert", words=words, damage=damage, table=table)
    return found


def made(load: Path, save: Path, *more: object) -> Path:
    """A conversion without the gate."""
    from mindspeed_llm.checkpoint.convert import main

    assert main([str(word) for word in ("--load-dir", load, "--save-dir", save, *more)]) == 0
    return save


def statuses(report: dict[str, Any]) -> dict[str, str]:
    """Check -> PASS, FAIL or SKIPPED."""
    return {check["name"]: check["status"] for check in report["checks"]}
