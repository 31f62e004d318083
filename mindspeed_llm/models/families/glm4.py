"""GLM-4 (9B and 32B of 0414): norms after attention and MLP, half of each head rotated in neighbouring pairs, gate and
up in one tensor.

Defaults are those of `transformers.Glm4Config`.
"""

from mindspeed_llm.models.families.base import Family, HfKey, Join
from mindspeed_llm.models.families.keys import llama_keys
from mindspeed_llm.models.families.rows import (
    attention_rows,
    embedding_row,
    final_rows,
    mlp_rows,
    norm_row,
    post_norm_rows,
)

GLM4 = Family(
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    config=llama_keys(
        positions=131072,
        epsilon=1.5625e-7,
        num_query_groups=HfKey("num_key_value_heads", 2),
        kv_channels=HfKey("head_dim", 128),
        add_qkv_bias=HfKey("attention_bias", True),
        rotary_percent=HfKey("partial_rotary_factor", 0.5),
    ),
    fixed={"post_norms": True, "rotary_interleaved": True},
    requires={"hidden_act": "silu", "rope_local_base_freq": None},
    weights=(
        embedding_row(),
        norm_row("input_layernorm", "input_layernorm"),
        *attention_rows(),
        norm_row("pre_mlp_layernorm", "post_attention_layernorm"),
        *mlp_rows(fc1=("mlp.gate_up_proj",), join=Join.SAME),
        *post_norm_rows(attention="post_self_attn_layernorm", mlp="post_mlp_layernorm"),
        *final_rows(),
    ),
)
