"""Rows of weight tables by the kind of layer they belong to, so that a family page names its tensors once.

Every function gives rows in the order in which megatron-core's modules hold them; HF names are relative to the layer.
The bias rows depend on the features `add_qkv_bias`, `add_proj_bias` and `add_mlp_bias`, so a family without biases
needs to say nothing.
"""

from mindspeed_llm.models.families.base import Join, Kind, Weight

LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

Rows = tuple[Weight, ...]


def embedding_row(hf: str = "model.embed_tokens") -> Weight:
    """The embedding table."""
    return Weight("embedding.word_embeddings.weight", (f"{hf}.weight",), Kind.VOCAB, ("vocab", "hidden"))


def final_rows(norm: str = "model.norm", head: str = "lm_head") -> Rows:
    """The norm after the last layer, and the output layer where it is not the embedding's."""
    untied = ("!tie_word_embeddings",)
    return (
        Weight("decoder.final_layernorm.weight", (f"{norm}.weight",), Kind.REPLICATED, ("hidden",)),
        Weight("output_layer.weight", (f"{head}.weight",), Kind.VOCAB, ("vocab", "hidden"), when=untied),
    )


def norm_row(name: str, hf: str, size: str = "hidden", when: tuple[str, ...] = ()) -> Weight:
    """A norm of the layer.

    Args:
        name, hf: within the layer, without `.weight`.
        size: its dimension's name.
    """
    return Weight(f"{LAYER}{name}.weight", (f"{HF_LAYER}{hf}.weight",), Kind.REPLICATED, (size,), when=when)


def linear_rows(
    name: str,
    hf: tuple[str, ...],
    kind: Kind,
    shape: tuple[str, str],
    bias: str | None,
    join: Join | None = None,
    when: tuple[str, ...] = (),
) -> Rows:
    """A linear layer: its weight and, where the model has the feature `bias`, its bias.

    Args:
        name, hf: within the layer, without `.weight`.
        shape: names of the dimensions (rows, columns).
        join: how the HF tensors are joined, where their number does not say it.
        when: further features both rows depend on.
    """
    names = [tuple(f"{HF_LAYER}{one}.{part}" for one in hf) for part in ("weight", "bias")]
    rows = (Weight(f"{LAYER}{name}.weight", names[0], kind, shape, when=when, join=join),)
    if bias is None:
        return rows
    # A row-parallel layer's bias is added once, after the sum over the ranks.
    bias_kind = Kind.REPLICATED if kind is Kind.ROW else kind
    return (*rows, Weight(f"{LAYER}{name}.bias", names[1], bias_kind, shape[:1], when=(*when, bias), join=join))


def attention_rows(
    qkv: tuple[str, ...] = QKV, proj: str = "self_attn.o_proj", join: Join | None = None, when: tuple[str, ...] = ()
) -> Rows:
    """Grouped-query attention: output projection, q/k/v projection, and the norms of q and k where there are any.

    Args:
        qkv: the HF tensors of q, k and v; one name with `join` SAME (rows group by group) or STACKED_QKV.
        proj: the HF tensor of the output projection.
    """
    return (
        *linear_rows("self_attention.linear_proj", (proj,), Kind.ROW, ("hidden", "query"), "add_proj_bias", when=when),
        *linear_rows("self_attention.linear_qkv", qkv, Kind.QKV, ("qkv", "hidden"), "add_qkv_bias", join, when),
        norm_row("self_attention.q_layernorm", "self_attn.q_norm", "head", (*when, "qk_layernorm")),
        norm_row("self_attention.k_layernorm", "self_attn.k_norm", "head", (*when, "qk_layernorm")),
    )


def sinks_row(hf: str = "self_attn.sinks") -> Weight:
    """The attention sinks: one logit per query head; it stands before the projections (gpt-oss)."""
    name = f"{LAYER}self_attention.core_attention.softmax_offset"
    return Weight(name, (f"{HF_LAYER}{hf}",), Kind.COLUMN, ("heads",), when=("attention_sinks",))


def mlp_rows(
    fc1: tuple[str, ...] = GATE_UP, fc2: str = "mlp.down_proj", join: Join | None = None, when: tuple[str, ...] = ()
) -> Rows:
    """A gated MLP.

    Args:
        fc1: the HF tensors of gate and up; one name with `join` SAME where gate lies above up in one tensor.
        fc2: the HF tensor of the down projection.
    """
    return (
        *linear_rows("mlp.linear_fc1", fc1, Kind.GATED, ("gated", "hidden"), "add_mlp_bias", join, when),
        *linear_rows("mlp.linear_fc2", (fc2,), Kind.ROW, ("hidden", "ffn"), "add_mlp_bias", when=when),
    )


def post_norm_rows(attention: str, mlp: str) -> Rows:
    """The norms of the attention's and of the MLP's output, before the residual sums."""
    return norm_row("post_attn_norm", attention), norm_row("post_mlp_layernorm", mlp)


LLAMA_ROWS: Rows = (
    embedding_row(),
    norm_row("input_layernorm", "input_layernorm"),
    *attention_rows(),
    norm_row("pre_mlp_layernorm", "post_attention_layernorm"),
    *mlp_rows(),
    *final_rows(),
)
"""The table of a model with transformers' Llama names."""
