"""InternLM3 (8B): a Llama whose biases are switched by `qkv_bias` (q, k, v) and `bias` (all other linear layers).

Its network is remote code on the hub (`modeling_internlm3.py`); transformers reads it as a Llama and calls the two
`attention_bias` and `mlp_bias`. Defaults are those of `transformers.InternLM3Config`.
"""

from collections.abc import Mapping
from typing import Any

from mindspeed_llm.models.families.base import Derived, Family, HfKey
from mindspeed_llm.models.families.keys import NOT_EXPRESSED, llama_keys
from mindspeed_llm.models.families.rows import LLAMA_ROWS


def either(*keys: str) -> Derived:
    """Whether any of these keys is true."""

    def found(flat: Mapping[str, Any]) -> bool:
        return any(bool(flat.get(key)) for key in keys)

    return found


INTERNLM3 = Family(
    name="internlm3",
    architectures=("InternLM3ForCausalLM",),
    config=llama_keys(
        positions=32768,
        epsilon=1e-5,
        num_query_groups=HfKey("num_key_value_heads", 2),
        kv_channels=HfKey("head_dim", 128),
        add_qkv_bias=either("qkv_bias", "attention_bias"),
        add_proj_bias=either("bias", "mlp_bias"),
        add_mlp_bias=either("bias", "mlp_bias"),
    ),
    fixed={},
    requires=NOT_EXPRESSED,
    weights=LLAMA_ROWS,
    converted_as=("llama2",),
)
