"""Tiny models for the torch_dist tests: their configs, random weights, and short ways to write and check them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mindspeed_llm.checkpoint.formats.lazy import narrow
from mindspeed_llm.checkpoint.formats.torch_dist import TorchDistSource
from mindspeed_llm.checkpoint.formats.torch_dist_writer import write_torch_dist
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.models.config import ModelConfig
from tests.checkpoint.tiny import hf_config
from tests.models.tiny_moe import ATTENTION, COMMON, LATENT, QWEN_MOE, SIGMOID_MOE

SINGLETONS = {"singleton_local_shards": True}
PER_LAYER = {"non_homogeneous_layers": True}
PREDICTING = {"use_qk_norm": True, "attention_bias": False, "num_nextn_predict_layers": 1}
RAW = {
    "dense": hf_config(dtype="float32"),
    "tied": hf_config(tied=True, dtype="float32"),
    "experts": {"architectures": ["Qwen3MoeForCausalLM"], **COMMON, **ATTENTION, **QWEN_MOE},
    "mixed": {"architectures": ["Glm4MoeForCausalLM"], **COMMON, **ATTENTION, **SIGMOID_MOE, **PREDICTING},
    "latent": {"architectures": ["DeepseekV3ForCausalLM"], **COMMON, **LATENT, **SIGMOID_MOE, "q_lora_rank": 16},
}
OWN_TABLES = ("mtp.layers.0.embed_tokens.weight", "mtp.layers.0.output_layer.weight")
"""Hub tensors megatron-core has no place for: its prediction layers share the network's."""


DIFFERING = ("mixed", "latent")
"""Models whose first layer has no experts."""


@cache
def model(name: str) -> ModelConfig:
    """One of the tiny models, in float32."""
    raw = {"num_nextn_predict_layers": 0, **RAW[name], "torch_dtype": "float32"}
    return ModelConfig.from_hf_dict(raw, "here")


@dataclass
class Drawn:
    """Random weights by logical name (`TensorSource`)."""

    config: ModelConfig

    def __post_init__(self) -> None:
        self.table = WeightTable(self.config)
        generator = torch.Generator().manual_seed(3)
        dtype = getattr(torch, self.config.dtype)
        self.tensors = {
            name: torch.randn(entry.shape, generator=generator).to(dtype) for name, entry in self.table.entries.items()
        }

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        return narrow(self.tensors[self.table.resolve(name)], rows, columns)


def written(folder: Path, source: Any, **options: Any) -> Path:
    """A checkpoint of ours."""
    folder.mkdir(parents=True)
    write_torch_dist(source, folder, **options)
    return folder


def check_source(source: TorchDistSource, expected: Callable[[str], torch.Tensor]) -> None:
    """Every tensor of the table is there, whole and in boxes, bit for bit."""
    assert source.names() == list(source.table.entries)
    for name in source.names():
        whole = expected(name)
        assert source.dtype(name) == whole.dtype and torch.equal(source.read(name), whole), name
        rows = whole.shape[0]
        box = [(rows // 2, rows), (1, 3)]
        columns = [(2, 5), (0, 1)] if whole.dim() > 1 and whole.shape[1] > 5 else None
        assert torch.equal(source.read(name, box, columns), narrow(whole, box, columns).contiguous()), name
