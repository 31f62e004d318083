"""Gemma 3, text: as Gemma 2 without caps, with normalised q and k; five sliding layers to a full one, each kind with
its own rotary base.

Defaults are those of `transformers.Gemma3TextConfig`. A rope scaling is that of the full layers.
"""

from mindspeed_llm.models.families.base import Family, HfKey
from mindspeed_llm.models.families.gemma2 import GEMMA_FEATURES, GEMMA_ROWS
from mindspeed_llm.models.families.keys import llama_keys, nullable, window_by_pattern

GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    config=llama_keys(
        positions=131072,
        theta=1_000_000.0,
        tied=True,
        num_query_groups=HfKey("num_key_value_heads", 4),
        kv_channels=HfKey("head_dim", 256),
        vocab_size=HfKey("vocab_size", 262208),
        add_qkv_bias=HfKey("attention_bias", False),
        add_proj_bias=HfKey("attention_bias", False),
        rotary_base_local=HfKey("rope_local_base_freq", 10000.0),
        attention_scale=lambda flat: (flat.get("query_pre_attn_scalar") or 256) ** -0.5,
        logit_softcap=nullable("final_logit_softcapping", None),
        embedding_scale=lambda flat: flat["hidden_size"] ** 0.5,
        **window_by_pattern(window=4096, pattern=6),
    ),
    fixed={**GEMMA_FEATURES, "qk_layernorm": True},
    requires={
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": False,
        "attn_logit_softcapping": None,
        "partial_rotary_factor": 1.0,
        "rope_scaling_local": None,
    },
    weights=GEMMA_ROWS,
    aliases=("gemma3_text",),
)
