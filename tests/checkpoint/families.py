"""A tiny HF folder of every family and notable variant, generated from its weight table: no two sizes alike.

What the values mean is proven by the parity tests against transformers; here they only have to arrive bit for bit.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.models.config import ModelConfig

LLAMA_LIKE = {
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "intermediate_size": 52,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "vocab_size": 67,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LATENT = {
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
WINDOWS = ["sliding_attention", "full_attention"] * 2
TINY: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 48},
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 8,
        "query_pre_attn_scalar": 10,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 8,
        "query_pre_attn_scalar": 10,
        "layer_types": WINDOWS,
    },
    "glm4": {"architectures": ["Glm4ForCausalLM"], "attention_bias": True, "partial_rotary_factor": 0.5},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "hidden_size": 48},
    "seed_oss": {"architectures": ["SeedOssForCausalLM"], "attention_bias": True, "attention_out_bias": True},
    "internlm2": {"architectures": ["InternLM2ForCausalLM"], "hidden_size": 48, "bias": False},
    "internlm3": {"architectures": ["InternLM3ForCausalLM"], "qkv_bias": False, "bias": False},
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], **EXPERTS},
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "hidden_size": 48,
        "shared_expert_intermediate_size": 28,
        "mlp_only_layers": [1],
        **EXPERTS,
    },
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "num_nextn_predict_layers": 1,
        **{key: value for key, value in LATENT.items() if "lora" not in key and "head" not in key},
    },
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "q_lora_rank": None,
        "num_key_value_heads": 8,
        "topk_method": "greedy",
        **LATENT,
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "q_lora_rank": 18,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        **LATENT,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": WINDOWS,
    },
}


def hf_values(name: str) -> dict[str, Any]:
    """The config.json of a tiny model."""
    values = {**LLAMA_LIKE, **TINY[name]}
    if name in ("mixtral",):
        values.pop("head_dim")
        values["hidden_size"] = 48
    return values


def make_family(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the tiny model of a family: random values of each tensor's usual type."""
    folder.mkdir(parents=True)
    values = hf_values(name)
    table = WeightTable(ModelConfig.from_hf_dict(values, name))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for hf, (entry, part) in table.hf_names.items():
        dtype = torch.float32 if entry.row.keep_dtype else torch.bfloat16
        tensors[hf] = torch.randn(entry.stored_shape(part), generator=generator).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values))
    return folder
