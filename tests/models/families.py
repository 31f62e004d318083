"""The tiny models of the dense families, with the variants of their configs that change the network."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.models.parity import Tiny, edit_config

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
FREE_YARN = {**YARN, "truncate": False, "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.5, "mscale_all_dim": 0.5}
SHORT, LONG = [1.0, 1.1, 1.3, 1.7], [1.0, 1.5, 4.0, 9.0]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "rope_theta": 500.0}
PHI = {"hidden_size": 48, "head_dim": 8, "original_max_position_embeddings": 16}


def as_internlm2(path: Path) -> None:
    """A saved Llama under InternLM2's names: q, k, v of each group one after the other in `wqkv`."""
    import torch

    tensors, found = load_file(path / "model.safetensors"), {}
    heads, groups, size = 6, 2, 10
    names = {
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
    }  # fmt: skip
    for name, values in tensors.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            shapes = [(groups, heads // groups, size), (groups, 1, size), (groups, 1, size)]
            stacked = torch.cat([one.view(*shape, *one.shape[1:]) for one, shape in zip(parts, shapes, strict=True)], 1)
            found[name.replace("self_attn.q_proj", "attention.wqkv")] = stacked.reshape(-1, *values.shape[1:])
        elif "k_proj" not in name and "v_proj" not in name:
            found[name] = values
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    bias = any(name.endswith("wqkv.bias") for name in found)
    edit_config(path, architectures=["InternLM2ForCausalLM"], bias=bias, attention_bias=None, mlp_bias=None)


def as_internlm3(path: Path) -> None:
    """A saved Llama as the hub's InternLM3, whose config calls its biases otherwise."""
    bias = any(name.endswith("o_proj.bias") for name in load_file(path / "model.safetensors"))
    changes = {"qkv_bias": bias, "bias": bias, "attention_bias": None, "mlp_bias": None}
    edit_config(path, architectures=["InternLM3ForCausalLM"], **changes)


def without_head_dim(path: Path) -> None:
    """Phi-3's configs do not name the size of a head."""
    edit_config(path, head_dim=None)


QWEN = [
    Tiny("qwen3", "Qwen3Config"),
    Tiny(
        "qwen3 tied, biases, yarn",
        "Qwen3Config",
        {"tie_word_embeddings": True, "attention_bias": True, "rope_parameters": YARN},
    ),
    Tiny("qwen3 window", "Qwen3Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    Tiny("qwen2", "Qwen2Config"),
    Tiny("qwen2 tied", "Qwen2Config", {"tie_word_embeddings": True}),
    Tiny("qwen2 window", "Qwen2Config", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    Tiny("qwen2 yarn untruncated", "Qwen2Config", {"rope_parameters": FREE_YARN}),
]
LLAMA = [
    Tiny("llama", "LlamaConfig"),
    Tiny("llama 3.1", "LlamaConfig", {"rope_parameters": LLAMA3}),
    Tiny("llama 3.2 tied", "LlamaConfig", {"rope_parameters": {**LLAMA3, "factor": 32.0}, "tie_word_embeddings": True}),
    Tiny("llama biases", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    Tiny("llama dynamic below", "LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    Tiny(
        "llama dynamic beyond",
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    ),
    Tiny("seed-oss", "SeedOssConfig", {"attention_bias": True, "attention_out_bias": False}),
    Tiny("seed-oss all biases", "SeedOssConfig", {"attention_out_bias": True, "mlp_bias": True}),
    Tiny("internlm2", "LlamaConfig", edit=as_internlm2),
    Tiny("internlm2 biases", "LlamaConfig", {"attention_bias": True, "rope_theta": 99.0}, edit=as_internlm2),
    Tiny("internlm3", "LlamaConfig", edit=as_internlm3),
    Tiny(
        "internlm3 biases, dynamic",
        "LlamaConfig",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 700.0},
        },
        edit=as_internlm3,
    ),  # fmt: skip
]
MISTRAL = [
    Tiny("mistral", "MistralConfig", {"sliding_window": None}),
    Tiny("mistral window", "MistralConfig", {"sliding_window": 6}),
    Tiny(
        "mistral linear",
        "MistralConfig",
        {"sliding_window": None, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0}},
    ),
]
GEMMA = [
    Tiny("gemma2", "Gemma2Config", {"sliding_window": 5, "query_pre_attn_scalar": 7, "tie_word_embeddings": True}),
    Tiny(
        "gemma2 small caps, untied",
        "Gemma2Config",
        {"sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    Tiny(
        "gemma2 no caps",
        "Gemma2Config",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    Tiny(
        "gemma3",
        "Gemma3TextConfig",
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "tie_word_embeddings": True,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),  # fmt: skip
    Tiny(
        "gemma3 untied, bases as released",
        "Gemma3TextConfig",
        {"sliding_window": 6, "sliding_window_pattern": 2, "final_logit_softcapping": 4.0},
    ),
]
GLM = [
    Tiny("glm4", "Glm4Config", {"head_dim": 12}),
    Tiny("glm4 no biases, yarn", "Glm4Config", {"head_dim": 16, "attention_bias": False, "rope_parameters": YARN}),
]
PHI3 = [
    Tiny("phi3", "Phi3Config", PHI, edit=without_head_dim),
    Tiny("phi3 longrope beyond", "Phi3Config", {**PHI, "rope_parameters": LONGROPE}),
    Tiny("phi3 longrope below", "Phi3Config", {**PHI, "rope_parameters": LONGROPE}, length=16),
    Tiny(
        "phi3 partial longrope, window",
        "Phi3Config",
        {
            **PHI,
            "partial_rotary_factor": 0.5,
            "sliding_window": 6,
            "tie_word_embeddings": True,
            "rope_parameters": {**LONGROPE, "short_factor": SHORT[:2], "long_factor": LONG[1:3]},
        },
    ),  # fmt: skip
]
DENSE = [*QWEN, *LLAMA, *MISTRAL, *GEMMA, *GLM, *PHI3]
