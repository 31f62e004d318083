"""Tiny models of every family with experts: no two sizes alike, every weight redrawn, saved as transformers saves them.

transformers starts biases, sinks and router corrections at 0 and norms at 1; a model that dropped them would pass. So
all parameters and persistent buffers are drawn anew.
"""

import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

ATTENTION = {"hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12}
COMMON = {
    "num_hidden_layers": 3,
    "intermediate_size": 44,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LATENT = {
    "hidden_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.1,
    "original_max_position_embeddings": 16,
}
QWEN_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 18}
SHARED_MOE = {**QWEN_MOE, "shared_expert_intermediate_size": 22}
SIGMOID_MOE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 18,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Tiny:
    """A tiny model: the transformers config class, its values, and what of it the test varies."""

    name: str
    config_class: str
    values: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        return self.name


def tiny(name: str, config_class: str, *parts: dict[str, Any], **values: Any) -> Tiny:
    """A tiny model of these values."""
    merged = dict(COMMON)
    for part in (*parts, values):
        merged.update(part)
    return Tiny(name, config_class, merged)


QWEN3_MOE = tiny("qwen3-moe", "Qwen3MoeConfig", ATTENTION, QWEN_MOE, norm_topk_prob=True)
DEEPSEEK_V3 = tiny("deepseek-v3", "DeepseekV3Config", LATENT, SIGMOID_MOE, q_lora_rank=16)
DEEPSEEK_V3_YARN = tiny(
    "deepseek-v3-yarn", "DeepseekV3Config", LATENT, SIGMOID_MOE, q_lora_rank=16, rope_parameters=YARN
)
DEEPSEEK_V2_LITE = tiny(
    "deepseek-v2-lite", "DeepseekV2Config", LATENT, SIGMOID_MOE, q_lora_rank=None, n_group=1, topk_group=1
)
MIXTRAL = tiny("mixtral", "MixtralConfig", ATTENTION, num_local_experts=6, num_experts_per_tok=2)
GLM4_MOE = tiny("glm4-moe", "Glm4MoeConfig", ATTENTION, SIGMOID_MOE, use_qk_norm=True, attention_bias=True)
QWEN2_MOE = tiny("qwen2-moe", "Qwen2MoeConfig", ATTENTION, SHARED_MOE)
GPT_OSS = tiny("gpt-oss", "GptOssConfig", ATTENTION, num_local_experts=6, num_experts_per_tok=3, sliding_window=5)

WITHOUT_LATENT = (
    QWEN3_MOE,
    tiny("qwen3-moe-tied", "Qwen3MoeConfig", ATTENTION, QWEN_MOE, tie_word_embeddings=True, attention_bias=True),
    tiny("qwen3-moe-sparse", "Qwen3MoeConfig", ATTENTION, QWEN_MOE, num_hidden_layers=4, decoder_sparse_step=2),
    tiny("qwen3-moe-mlp-only", "Qwen3MoeConfig", ATTENTION, QWEN_MOE, mlp_only_layers=[1], norm_topk_prob=True),
    tiny("qwen2-moe", "Qwen2MoeConfig", ATTENTION, QWEN_MOE, shared_expert_intermediate_size=22),
    tiny(
        "qwen2-moe-no-bias", "Qwen2MoeConfig", ATTENTION, QWEN_MOE, shared_expert_intermediate_size=22, qkv_bias=False
    ),
    MIXTRAL,
    tiny("mixtral-window", "MixtralConfig", ATTENTION, num_local_experts=4, num_experts_per_tok=1, sliding_window=5),
    GLM4_MOE,
    tiny("glm4-moe-ungrouped", "Glm4MoeConfig", ATTENTION, SIGMOID_MOE, n_group=1, topk_group=1, norm_topk_prob=False),
    GPT_OSS,
)
WITH_LATENT = (
    DEEPSEEK_V3,
    tiny("deepseek-v3-plain-q", "DeepseekV3Config", LATENT, SIGMOID_MOE, q_lora_rank=None, norm_topk_prob=False),
    DEEPSEEK_V3_YARN,
    tiny("deepseek-v3-halves", "DeepseekV3Config", LATENT, SIGMOID_MOE, q_lora_rank=16, rope_interleave=False),
    DEEPSEEK_V2_LITE,
    tiny(
        "deepseek-v2",
        "DeepseekV2Config",
        LATENT,
        SIGMOID_MOE,
        q_lora_rank=16,
        topk_method="group_limited_greedy",
        n_shared_experts=2,
        rope_parameters=YARN,
    ),
)
EVERY = WITHOUT_LATENT + WITH_LATENT


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """New values of a tensor: norms around 1, biases and corrections well away from 0, routers decided."""
    values = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.2 * values
    if name.endswith(("bias", "sinks")):
        return 0.3 * values
    return values * (0.4 if "gate.weight" in name or "router" in name or "embed" in name else 0.2)


def build(one: Tiny, seed: int = 3) -> torch.nn.Module:
    """The transformers model with every parameter and persistent buffer redrawn, fp32, eager attention."""
    import transformers

    config = getattr(transformers, one.config_class)(**one.values)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(draw(name, tensor.shape, generator))
    return model.eval()


@cache
def saved(one: Tiny) -> Path:
    """The model as a Hugging Face folder, kept until the tests end."""
    holder = tempfile.TemporaryDirectory(prefix="moe-")
    _holders.append(holder)
    build(one).save_pretrained(holder.name)
    return Path(holder.name)


_holders: list[tempfile.TemporaryDirectory[str]] = []


def tokens(rows: int = 2, length: int = 19, vocabulary: int = 61) -> torch.Tensor:
    """Token ids [rows, length]."""
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference(one: Tiny, ids: torch.Tensor) -> torch.Tensor:
    """transformers' logits [rows, length, vocabulary]."""
    return build(one)(input_ids=ids, use_cache=False).logits
