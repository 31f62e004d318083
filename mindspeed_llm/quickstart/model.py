"""A tiny Qwen3 in Hugging Face's layout, untrained, drawn by torch from a seed: no transformers class is involved."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

INITIAL_STD = 0.06


@dataclass(frozen=True)
class TinySize:
    """Sizes of the model; about 3.5 million parameters with 1,200 vocabulary entries."""

    layers: int = 4
    hidden: int = 256
    ffn: int = 768
    heads: int = 4
    groups: int = 2
    head_dim: int = 64
    positions: int = 1024


def config(size: TinySize, vocabulary: int, end_of_turn: int, end_of_text: int) -> dict[str, Any]:
    """What `config.json` says; embeddings are tied as in the small Qwen3 models."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_turn,
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": INITIAL_STD,
        "intermediate_size": size.ffn,
        "max_position_embeddings": size.positions,
        "model_type": "qwen3",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.groups,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    }


def shapes(size: TinySize, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name and shape of every tensor; vectors are norms."""
    query, key = size.heads * size.head_dim, size.groups * size.head_dim
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, size.hidden)}
    for layer in range(size.layers):
        place = f"model.layers.{layer}."
        found |= {
            place + "input_layernorm.weight": (size.hidden,),
            place + "self_attn.q_proj.weight": (query, size.hidden),
            place + "self_attn.k_proj.weight": (key, size.hidden),
            place + "self_attn.v_proj.weight": (key, size.hidden),
            place + "self_attn.q_norm.weight": (size.head_dim,),
            place + "self_attn.k_norm.weight": (size.head_dim,),
            place + "self_attn.o_proj.weight": (size.hidden, query),
            place + "post_attention_layernorm.weight": (size.hidden,),
            place + "mlp.gate_proj.weight": (size.ffn, size.hidden),
            place + "mlp.up_proj.weight": (size.ffn, size.hidden),
            place + "mlp.down_proj.weight": (size.hidden, size.ffn),
        }
    found["model.norm.weight"] = (size.hidden,)
    return found


def draw(size: TinySize, vocabulary: int, seed: int) -> dict[str, torch.Tensor]:
    """Initial float32 weights by Qwen3's rule: matrices normal with standard deviation 0.02, norms one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * INITIAL_STD
        for name, shape in shapes(size, vocabulary).items()
    }


def write_model(folder: Path, size: TinySize, vocabulary: int, end_of_turn: int, end_of_text: int, seed: int) -> int:
    """Write config, generation config and weights into an existing folder; -> number of parameters."""
    weights = draw(size, vocabulary, seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config(size, vocabulary, end_of_turn, end_of_text))
    generation = {"do_sample": False, "eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text}
    _write_json(folder / "generation_config.json", generation)
    return sum(weight.numel() for weight in weights.values())


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
