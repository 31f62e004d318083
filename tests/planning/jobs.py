"""The model of `benchmarks/train_step.py` with fewer layers, at the layouts whose predictions are measured."""

from dataclasses import replace
from typing import Any

from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.planning.job import Job

LORA = LoraSettings(16, 32.0, ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))
WHOLE_HEAD = replace(LORA, dtype="float32", modules_to_save=("output_layer",))
SP = {"tp": 2, "sequence_parallel": True}
UNIFORM = {"recompute": "full", "recompute_method": "uniform", "recompute_layers": 1}


def model(layers: int = 2, vocab: int = 32000, tied: bool = True) -> ModelConfig:
    """hidden 1024, ffn 3072, 16 heads of 64 over 8 groups."""
    values = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
    }
    return ModelConfig.from_hf_dict(values, "the benchmark's model")


def experts_model(layers: int = 2) -> ModelConfig:
    """Of the same width, eight experts of which each token has two."""
    values = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 8000,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 768,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return ModelConfig.from_hf_dict(values, "the benchmark's model with experts")


def job(
    layers: int = 2,
    tp: int = 1,
    pp: int = 1,
    chunk: int | None = None,
    cards: int | None = None,
    lora: bool = True,
    lora_settings: LoraSettings = LORA,
    vocab: int = 4000,
    tied: bool = True,
    experts: bool = False,
    ep: int = 1,
    etp: int | None = None,
    **more: Any,
) -> Job:
    """A job of 2 x 128 tokens a micro-batch; `cards` left out: one replica."""
    of = experts_model(layers) if experts else model(layers, vocab, tied)
    layout = Layout.create(layers, tp, pp, chunk, ep=ep, etp=etp)
    given = {"micro_batch": 2, "length": 128, "fused": lora, **more}
    return Job(
        of, layout, cards=cards or tp * pp * more.get("context", 1), lora=lora_settings if lora else None, **given
    )
