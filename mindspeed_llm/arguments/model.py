"""What the network is: only to check what the user believes; the model folder decides."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError


@dataclass
class ModelOptions:
    """Model architecture (all optional: read from the model folder; a contradiction is refused, naming both values)."""

    spec: list[str] | None = option(
        None,
        help="Layer specification as MODULE ATTRIBUTE, e.g. mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec.",
        nargs=2,
    )
    model_type_hf: str | None = option(None, help="Model family, e.g. qwen3.")
    num_layers: int | None = option(None, help="Number of transformer layers.")
    hidden_size: int | None = option(None, help="Width of the residual stream.")
    ffn_hidden_size: int | None = option(None, help="Width of the feed-forward layers.")
    num_attention_heads: int | None = option(None, help="Number of query heads.")
    group_query_attention: bool | None = option(None, help="Whether query heads share key and value heads.")
    num_query_groups: int | None = option(None, help="Number of key and value heads.")
    kv_channels: int | None = option(None, help="Width of one attention head.")
    qk_layernorm: bool | None = option(None, help="Whether queries and keys are normalised per head.")
    add_qkv_bias: bool | None = option(None, help="Whether the query, key and value projections have a bias.")
    disable_bias_linear: bool | None = option(None, help="Whether the other linear layers have no bias.")
    swiglu: bool | None = option(None, help="Whether the feed-forward layers are gated by SiLU.")
    normalization: str | None = option(None, help="Kind of normalisation.", choices=("RMSNorm", "LayerNorm"))
    norm_epsilon: float | None = option(None, help="Number added to the variance in each normalisation.")
    position_embedding_type: str | None = option(None, help="Kind of position embedding.", choices=("rope",))
    rotary_base: float | None = option(None, help="Base of the rotary frequencies.")
    max_position_embeddings: int | None = option(
        None, help="Longest sequence; bounds generation and data, changes no weight. May be below the model's own."
    )
    untie_embeddings_and_output_weights: bool | None = option(
        None, help="Whether the output layer has its own weights instead of the embedding's."
    )
    num_experts: int | None = option(None, help="Number of experts in a layer that has them.")
    moe_router_topk: int | None = option(None, help="Experts that each token goes to.")
    moe_ffn_hidden_size: int | None = option(None, help="Width of one expert.")
    vocab_size: int | None = option(None, help="Rows of the embedding in the HF model.")
    padded_vocab_size: int | None = option(None, help="Rows of the embedding after padding.")
    make_vocab_size_divisible_by: int | None = option(
        None, help="The embedding's rows are padded to a multiple of this times the tensor-parallel size."
    )
    attention_dropout: float = option(0.0, help="Dropout on attention weights; only 0 is supported.")
    hidden_dropout: float = option(0.0, help="Dropout on the residual stream; only 0 is supported.")

    def check(self) -> None:
        """Raise UsageError for dropout: it would be ignored by the fused attention of some devices."""
        for name in ("attention_dropout", "hidden_dropout"):
            value = getattr(self, name)
            if value != 0:
                raise UsageError(f"--{name.replace('_', '-')} {value}: the base model is run without dropout; use 0")
