"""The `args` of a rank file: the Namespace upstream's programs read sizes from, in both directions.

Its keys are format facts: Megatron's own names (what the first converter and training save) and, for the second
converter, HF's. Ours carries both, so that either upstream program finds what it needs.
"""

import argparse
from typing import Any

import torch

from mindspeed_llm.checkpoint.formats.mcore_names import Dialect
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families import family

DESCRIBED = ("llama", "mistral", "qwen2", "qwen3")
"""Families of which Megatron's own args say all that matters; of others they lack experts, caps, windows or scaling."""


def upstream_args(
    config: ModelConfig, layout: Layout, padded_rows: int, iteration: int, dialect: Dialect | None = None
) -> argparse.Namespace:
    """What to store for a model in a layout.

    Args:
        padded_rows: of the embedding over all ranks.
        dialect: whose names the file uses; Megatron's local ones when None.
    """
    dialect = dialect or Dialect()
    noops = layout.noop_layers
    total = config.num_layers + len(noops)
    shared = {
        "model_type_hf": config.family,
        "num_layers": total,
        "encoder_num_layers": total,
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
        "rotary_percent": config.rotary_percent,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "add_position_embedding": True,
        "norm_epsilon": config.norm_epsilon,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": config.add_proj_bias or config.add_mlp_bias,
        "add_qkv_bias": config.add_qkv_bias,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "transformer_impl": dialect.implementation,
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
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "moe_tp_extend_ep": layout.tp_extends_ep,
        "schedules_method": "dualpipev" if layout.v_shaped else None,
        "noop_layers": ",".join(map(str, noops)) or None,
        "num_layer_list": None if layout.uniform else ",".join(map(str, layout.stage_layers)),
        "context_parallel_size": 1,
        "data_parallel_size": 1,
        "world_size": len(list(layout.ranks())),
        "sequence_parallel": False,
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
    special = {**expert_args(config, dialect), **latent_args(config)}
    # The whole config.json, as the second converter stores it: Megatron's names do not describe every model.
    return argparse.Namespace(**{**special, **hf_spelling, **config.hf_config, **shared, **parallel})


def expert_args(config: ModelConfig, dialect: Dialect) -> dict[str, Any]:
    """Megatron's and HF's names for what a mixture of experts is."""
    if not config.num_experts:
        return {"num_experts": None}
    first = next(iter(config.moe_layers), 0)
    plain = config.moe_layers == tuple(range(first, config.num_layers))
    return {
        "num_experts": config.num_experts,
        "moe_grouped_gemm": dialect.grouped,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "moe_router_topk": config.moe_router_topk,
        "num_experts_per_tok": config.moe_router_topk,
        "moe_layer_freq": 1 if plain else [int(layer in config.moe_layers) for layer in range(config.num_layers)],
        "first_k_dense_replace": first,
        "moe_shared_expert_intermediate_size": config.moe_shared_ffn_hidden_size or None,
        "norm_topk_prob": config.moe_router_norm_topk,
        "moe_router_score_function": config.moe_router_score,
        "moe_router_topk_scaling_factor": config.moe_router_scale,
        "moe_router_enable_expert_bias": config.moe_expert_bias,
    }


def latent_args(config: ModelConfig) -> dict[str, Any]:
    """Megatron's names for latent attention and prediction layers."""
    values: dict[str, Any] = {"mtp_num_layers": config.mtp_num_layers or None}
    if config.multi_latent_attention:
        values |= {
            "multi_latent_attention": True,
            "q_lora_rank": config.q_lora_rank or None,
            "kv_lora_rank": config.kv_lora_rank,
            "qk_head_dim": config.qk_head_dim,
            "qk_pos_emb_head_dim": config.qk_pos_emb_head_dim,
            "v_head_dim": config.v_head_dim,
        }
    return values


def config_from_args(args: Any, where: str, dtype: torch.dtype, family_name: str | None = None) -> ModelConfig:
    """The model of a checkpoint written by upstream.

    Args:
        args: the file's `args`.
        where: the file, for errors.
        dtype: of the tensors.
        family_name: `--model-type-hf`; needed only when the args do not tell.

    Raises:
        InputError: the args lack a size, or do not say all that matters about the family.
    """
    known = vars(args) if isinstance(args, argparse.Namespace) else {}

    def first(*names: str, default: Any = None) -> Any:
        for name in names:
            if known.get(name) is not None:
                return known[name]
        if default is None:
            raise InputError(f"{where}: its args have none of {', '.join(names)}; give a checkpoint with an args.json")
        return default

    named = family(family_name or family_of_args(known, where))
    stored = str(dtype).removeprefix("torch.")
    if known.get("architectures"):
        # The second converter stores HF's whole config.json, with the layers counted after its no-op layers.
        noops = [one for one in str(known.get("noop_layers") or "").split(",") if one]
        layers = known["num_layers"] - len(noops)
        raw = {**known, "num_hidden_layers": known.get("num_hidden_layers") or layers, "dtype": stored}
        raw["num_hidden_layers"] = min(raw["num_hidden_layers"], layers)
        raw["tie_word_embeddings"] = not known.get("untie_embeddings_and_output_weights", False)
        return ModelConfig.from_hf_dict(raw, where)
    if named.name not in DESCRIBED or known.get("rope_scaling_type"):
        raise InputError(
            f"{where}: its args do not describe a {named.name} model completely; convert it with --hf-cfg-dir, the"
            " folder of the original HF model"
        )
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
        "add_qkv_bias": bool(known.get("add_qkv_bias", False)),
        "dtype": stored,
    }
    return ModelConfig(family=named.name, **{**values, **named.fixed})


def check_recorded(args: Any, config: ModelConfig, where: str) -> None:
    """`InputError` when the args stored in a file describe another model than the args.json beside it."""
    known = vars(args) if isinstance(args, argparse.Namespace) else {}
    for key in ("hidden_size", "num_attention_heads", "kv_channels", "vocab_size"):
        stored, recorded = known.get(key), getattr(config, key)
        if stored is not None and stored != recorded:
            raise InputError(
                f"{where}: its args say {key} {stored}, its args.json says {recorded}; one is of another model"
            )


def family_of_args(known: dict[str, Any], where: str) -> str:
    """The family's name: stored by the second converter; in the layer specification's name for the first."""
    if isinstance(known.get("model_type_hf"), str):
        return known["model_type_hf"]
    spec = known.get("spec")
    if isinstance(spec, list) and spec and isinstance(spec[0], str) and spec[0].endswith("_spec"):
        return spec[0].rpartition(".")[2].removesuffix("_spec")
    raise InputError(f"{where}: its args do not say which model family this is; give --model-type-hf")
