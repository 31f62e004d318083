"""The `args` of a rank file: the Namespace upstream's programs read sizes from, in both directions.

Its keys are format facts: Megatron's own names (what the first converter and training save) and, for the second
converter, HF's. Ours carries both, so that either upstream program finds what it needs.
"""

import argparse
from typing import Any

import torch

from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families import family


def upstream_args(config: ModelConfig, layout: Layout, padded_rows: int, iteration: int) -> argparse.Namespace:
    """What to store for a model in a layout; `padded_rows` are those of the embedding over all ranks."""
    shared = {
        "model_type_hf": config.family,
        "num_layers": config.num_layers,
        "encoder_num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "qk_layernorm": config.qk_layernorm,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": padded_rows,
        "rotary_base": int(config.rotary_base) if float(config.rotary_base).is_integer() else config.rotary_base,
        "rotary_percent": 1.0,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "add_position_embedding": True,
        "norm_epsilon": config.norm_epsilon,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": config.add_proj_bias or config.add_mlp_bias,
        "add_qkv_bias": config.add_qkv_bias,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "transformer_impl": "local",
        "tokenizer_type": "PretrainedFromHF",
        "params_dtype": getattr(torch, config.dtype),
        "bf16": config.dtype == "bfloat16",
        "fp16": config.dtype == "float16",
    }
    parallel = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vp if layout.vp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": layout.layers_per_virtual_stage,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": layout.tp,
        "context_parallel_size": 1,
        "data_parallel_size": 1,
        "world_size": layout.tp * layout.pp,
        "sequence_parallel": False,
        "num_experts": None,
        "iteration": iteration,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "micro_batch_size": 1,
        "global_batch_size": 1024,
        "gradient_accumulation_fusion": False,
    }
    hf_spelling = {
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.ffn_hidden_size,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "torch_dtype": config.dtype,
    }
    return argparse.Namespace(**shared, **parallel, **hf_spelling)


def config_from_args(args: Any, where: str, dtype: torch.dtype, family_name: str | None = None) -> ModelConfig:
    """The model of a checkpoint written by upstream.

    Args:
        args: the file's `args`.
        where: the file, for errors.
        dtype: of the tensors.
        family_name: `--model-type-hf`; needed only when the args do not tell.

    Raises:
        InputError: the args lack a size, or describe experts.
    """
    known = vars(args) if isinstance(args, argparse.Namespace) else {}

    def first(*names: str, default: Any = None) -> Any:
        for name in names:
            if known.get(name) is not None:
                return known[name]
        if default is None:
            raise InputError(f"{where}: its args have none of {', '.join(names)}; give a checkpoint with an args.json")
        return default

    if known.get("num_experts") or known.get("n_routed_experts"):
        raise InputError(f"{where}: a mixture of experts is not supported yet")
    named = family(family_name or family_of_args(known, where))
    heads = first("num_attention_heads")
    # The second converter stores group_query_attention False for every model, beside HF's own key.
    grouped = known.get("group_query_attention", True)
    groups = known.get("num_key_value_heads") or (first("num_query_groups", default=heads) if grouped else heads)
    values = {
        "num_layers": first("num_layers"),
        "hidden_size": first("hidden_size"),
        "ffn_hidden_size": first("ffn_hidden_size", "intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": first("kv_channels", "head_dim"),
        "vocab_size": first("vocab_size", "padded_vocab_size"),
        "max_position_embeddings": first("max_position_embeddings", "seq_length"),
        "rotary_base": float(first("rotary_base", "rope_theta", default=10000.0)),
        "norm_epsilon": first("norm_epsilon", "rms_norm_eps", default=1e-6),
        "tie_word_embeddings": not known.get("untie_embeddings_and_output_weights", False),
        "dtype": str(dtype).removeprefix("torch."),
    }
    return ModelConfig(family=named.name, **{**values, **named.fixed})


def family_of_args(known: dict[str, Any], where: str) -> str:
    """The family's name: stored by the second converter; in the layer specification's name for the first."""
    if isinstance(known.get("model_type_hf"), str):
        return known["model_type_hf"]
    spec = known.get("spec")
    if isinstance(spec, list) and spec and isinstance(spec[0], str) and spec[0].endswith("_spec"):
        return spec[0].rpartition(".")[2].removesuffix("_spec")
    raise InputError(f"{where}: its args do not say which model family this is; give --model-type-hf")
