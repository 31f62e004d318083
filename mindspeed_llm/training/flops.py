"""Floating-point operations of a training step, by closed form.

Per token: a weight of n elements costs 2n forward and 2n for the gradient of its input; its own gradient costs 2n
more, which a frozen weight does not need. Attention (causal) costs 2 s h_a forward per layer for scores and values
together, s the length and h_a = heads x head dimension, and twice that backward.
"""

from mindspeed_llm.models.config import ModelConfig


def matmul_parameters(model: ModelConfig) -> int:
    """Elements of the weights a token is multiplied with: layers (its experts alone) and output layer."""
    heads, groups, width = model.num_attention_heads, model.num_query_groups, model.kv_channels
    attention = model.hidden_size * (heads + 2 * groups) * width + heads * width * model.hidden_size
    if model.multi_latent_attention:
        attention = latent_attention_parameters(model)
    widths = (active_width(model, layer) for layer in range(model.num_layers))
    mlp = sum(3 * width for width in widths) + len(model.moe_layers) * model.num_experts
    return model.num_layers * attention + (mlp + model.vocab_size) * model.hidden_size


def active_width(model: ModelConfig, layer: int) -> int:
    """Width of the MLPs a token passes in a layer: the dense one, or its experts and the shared ones."""
    if not model.has("moe", layer):
        return model.ffn_hidden_size
    return model.moe_router_topk * model.moe_ffn_hidden_size + model.moe_shared_ffn_hidden_size


def latent_attention_parameters(model: ModelConfig) -> int:
    """Elements of the matrices of one latent attention (DeepSeek)."""
    heads, head, value = model.num_attention_heads, model.qk_head_dim + model.qk_pos_emb_head_dim, model.v_head_dim
    q = (
        model.q_lora_rank * (model.hidden_size + heads * head)
        if model.q_lora_rank
        else model.hidden_size * heads * head
    )
    kv = model.hidden_size * (model.kv_lora_rank + model.qk_pos_emb_head_dim)
    return q + kv + model.kv_lora_rank * heads * (model.qk_head_dim + value) + heads * value * model.hidden_size


def step_flops(model: ModelConfig, tokens: int, length: int, frozen: bool, reference: bool = False) -> float:
    """FLOPs of forward and backward over `tokens` tokens in rows of `length`; `frozen` base (LoRA) or full tuning.

    Args:
        reference: one more forward pass, as preferences need.
    """
    products = ((4 if frozen else 6) + 2 * reference) * matmul_parameters(model) * tokens
    attention = (6 + 2 * reference) * model.num_layers * length * model.num_attention_heads * model.kv_channels * tokens
    return float(products + attention)
