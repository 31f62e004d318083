"""Gemma 2: norms on both sides of attention and MLP, capped scores and logits, every other layer slides; tied.

Defaults are those of `transformers.Gemma2Config`.
"""

from mindspeed_llm.models.families.base import Family, HfKey
from mindspeed_llm.models.families.keys import llama_keys, nullable, window_by_pattern
from mindspeed_llm.models.families.rows import (
    attention_rows,
    embedding_row,
    final_rows,
    mlp_rows,
    norm_row,
    post_norm_rows,
)

GEMMA_ROWS = (
    embedding_row(),
    norm_row("input_layernorm", "input_layernorm"),
    *attention_rows(),
    norm_row("pre_mlp_layernorm", "pre_feedforward_layernorm"),
    *mlp_rows(),
    *post_norm_rows(attention="post_attention_layernorm", mlp="post_feedforward_layernorm"),
    *final_rows(),
)

GEMMA_FEATURES = {"zero_centered_norm": True, "post_norms": True, "activation": "gelu_tanh"}

GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    config=llama_keys(
        positions=8192,
        tied=True,
        num_query_groups=HfKey("num_key_value_heads", 4),
        kv_channels=HfKey("head_dim", 256),
        add_qkv_bias=HfKey("attention_bias", False),
        add_proj_bias=HfKey("attention_bias", False),
        attention_scale=lambda flat: (flat.get("query_pre_attn_scalar") or 256) ** -0.5,
        attention_softcap=nullable("attn_logit_softcapping", 50.0),
        logit_softcap=nullable("final_logit_softcapping", 30.0),
        embedding_scale=lambda flat: flat["hidden_size"] ** 0.5,
        **window_by_pattern(window=4096, pattern=2),
    ),
    fixed=GEMMA_FEATURES,
    requires={
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": False,
        "partial_rotary_factor": 1.0,
        "rope_local_base_freq": None,
    },
    weights=GEMMA_ROWS,
)
