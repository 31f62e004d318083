"""InternLM2 and 2.5: a Llama under other names, with q, k and v in one tensor, group by group.

Its network is remote code on the hub (`modeling_internlm2.py`); the defaults are those of its configuration class.
"""

from mindspeed_llm.models.families.base import Family, HfKey, Join
from mindspeed_llm.models.families.keys import NOT_EXPRESSED, llama_keys
from mindspeed_llm.models.families.rows import attention_rows, embedding_row, final_rows, mlp_rows, norm_row

INTERNLM2 = Family(
    name="internlm2",
    architectures=("InternLM2ForCausalLM",),
    config=llama_keys(positions=2048, add_qkv_bias=HfKey("bias", True), add_proj_bias=HfKey("bias", True)),
    fixed={},
    requires=NOT_EXPRESSED,
    weights=(
        embedding_row("model.tok_embeddings"),
        norm_row("input_layernorm", "attention_norm"),
        *attention_rows(qkv=("attention.wqkv",), proj="attention.wo", join=Join.SAME),
        norm_row("pre_mlp_layernorm", "ffn_norm"),
        *mlp_rows(fc1=("feed_forward.w1", "feed_forward.w3"), fc2="feed_forward.w2"),
        *final_rows(head="output"),
    ),
    aliases=("internlm25", "internlm2.5"),
)
