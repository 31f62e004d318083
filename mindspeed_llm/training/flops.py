"""Floating-point operations of a training step, by closed form.

Per token: a weight of n elements costs 2n forward and 2n for the gradient of its input; its own gradient costs 2n
more, which a frozen weight does not need. Attention (causal) costs 2 s h_a forward per layer for scores and values
together, s the length and h_a = heads x head dimension, and twice that backward.
"""

from mindspeed_llm.models.config import ModelConfig


def matmul_parameters(model: ModelConfig) -> int:
    """Elements of all weights that take part in matrix products: layers and output layer, not the embedding look-up."""
    heads, groups, width = model.num_attention_heads, model.num_query_groups, model.kv_channels
    attention = model.hidden_size * (heads + 2 * groups) * width + heads * width * model.hidden_size
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    return model.num_layers * (attention + mlp) + model.vocab_size * model.hidden_size


def step_flops(model: ModelConfig, tokens: int, length: int, frozen: bool) -> float:
    """FLOPs of forward and backward over `tokens` tokens in rows of `length`; `frozen` base (LoRA) or full tuning."""
    products = (4 if frozen else 6) * matmul_parameters(model) * tokens
    attention = 6 * model.num_layers * length * model.num_attention_heads * model.kv_channels * tokens
    return float(products + attention)
