"""Qwen3, dense (0.6B to 32B): grouped-query attention with normalised q and k, gated SiLU MLP, no biases.

Shapes (defaults in brackets) are those of `transformers.Qwen3Config`. Tied (0.6B, 1.7B, 4B) and untied.
"""

from mindspeed_llm.models.families.base import Family, HfKey, Kind, Weight

LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."

WEIGHTS = (
    Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Kind.VOCAB, ("vocab", "hidden")),
    Weight(LAYER + "input_layernorm.weight", (HF_LAYER + "input_layernorm.weight",), Kind.REPLICATED, ("hidden",)),
    Weight(
        LAYER + "self_attention.linear_proj.weight",
        (HF_LAYER + "self_attn.o_proj.weight",),
        Kind.ROW,
        ("hidden", "query"),
    ),
    Weight(
        LAYER + "self_attention.linear_qkv.weight",
        tuple(HF_LAYER + f"self_attn.{part}_proj.weight" for part in "qkv"),
        Kind.QKV,
        ("qkv", "hidden"),
    ),
    Weight(
        LAYER + "self_attention.q_layernorm.weight",
        (HF_LAYER + "self_attn.q_norm.weight",),
        Kind.REPLICATED,
        ("head",),
    ),
    Weight(
        LAYER + "self_attention.k_layernorm.weight",
        (HF_LAYER + "self_attn.k_norm.weight",),
        Kind.REPLICATED,
        ("head",),
    ),
    Weight(
        LAYER + "pre_mlp_layernorm.weight",
        (HF_LAYER + "post_attention_layernorm.weight",),
        Kind.REPLICATED,
        ("hidden",),
    ),
    Weight(
        LAYER + "mlp.linear_fc1.weight",
        (HF_LAYER + "mlp.gate_proj.weight", HF_LAYER + "mlp.up_proj.weight"),
        Kind.GATED,
        ("gated", "hidden"),
    ),
    Weight(LAYER + "mlp.linear_fc2.weight", (HF_LAYER + "mlp.down_proj.weight",), Kind.ROW, ("hidden", "ffn")),
    Weight("decoder.final_layernorm.weight", ("model.norm.weight",), Kind.REPLICATED, ("hidden",)),
    Weight("output_layer.weight", ("lm_head.weight",), Kind.VOCAB, ("vocab", "hidden"), when=("!tie_word_embeddings",)),
)

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    config={
        "num_layers": HfKey("num_hidden_layers"),
        "hidden_size": HfKey("hidden_size"),
        "ffn_hidden_size": HfKey("intermediate_size"),
        "num_attention_heads": HfKey("num_attention_heads"),
        "num_query_groups": HfKey("num_key_value_heads"),
        "kv_channels": HfKey("head_dim", 128),
        "vocab_size": HfKey("vocab_size"),
        "max_position_embeddings": HfKey("max_position_embeddings", 32768),
        "rotary_base": HfKey("rope_theta", 10000.0),
        "norm_epsilon": HfKey("rms_norm_eps", 1e-6),
        "tie_word_embeddings": HfKey("tie_word_embeddings", False),
        "dtype": HfKey("dtype", "float32"),
    },
    fixed={"qk_layernorm": True},
    requires={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "rope_scaling": None},
    weights=WEIGHTS,
)
