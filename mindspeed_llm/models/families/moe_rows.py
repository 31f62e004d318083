"""Rows and config keys of families with experts, with latent attention and with prediction layers.

Every function gives rows for one layer, in the order of megatron-core's modules; HF names are relative to the layer.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mindspeed_llm.models.families.base import REQUIRED, Derived, HfKey, Kind, Weight
from mindspeed_llm.models.families.rows import (
    GATE_UP,
    HF_LAYER,
    LAYER,
    Rows,
    attention_rows,
    embedding_row,
    final_rows,
    linear_rows,
    mlp_rows,
    norm_row,
)

EXPERT = "mlp.experts.local_experts.{expert}."
SHARED = "mlp.shared_experts."
PREDICTION = "mtp.layers.{mtp}."
MOE = ("moe",)


def router_rows(hf: str = "mlp.gate") -> Rows:
    """The router, and its bias and its correction where the model has them."""
    correction = Weight(
        f"{LAYER}mlp.router.expert_bias",
        (f"{HF_LAYER}{hf}.e_score_correction_bias",),
        Kind.REPLICATED,
        ("experts",),
        when=(*MOE, "moe_expert_bias"),
        keep_dtype=True,
    )
    shape = ("experts", "hidden")
    return *linear_rows("mlp.router", (hf,), Kind.REPLICATED, shape, "moe_router_bias", when=MOE), correction


def expert_rows(hf: str = "mlp.experts", names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Rows:
    """The experts, one HF tensor each.

    Args:
        hf: the HF list of experts.
        names: of gate, up and down within an expert.
    """
    gate, up, down = (f"{hf}.{{expert}}.{name}" for name in names)
    return (
        *linear_rows(EXPERT + "linear_fc1", (gate, up), Kind.GATED, ("expert_gated", "hidden"), None, when=MOE),
        *linear_rows(EXPERT + "linear_fc2", (down,), Kind.ROW, ("hidden", "expert_ffn"), None, when=MOE),
    )


def shared_expert_rows(hf: str, gate: str | None = None) -> Rows:
    """The experts every token goes to, held as one MLP.

    Args:
        hf: the HF module that holds them.
        gate: the HF tensor of their gate; None in families without.
    """
    fc1 = (f"{hf}.gate_proj", f"{hf}.up_proj")
    when = (*MOE, "moe_shared_ffn_hidden_size")
    gated = (*when, "moe_shared_expert_gate")
    name = f"{LAYER}{SHARED}gate_weight"
    return (
        *linear_rows(SHARED + "linear_fc1", fc1, Kind.GATED, ("shared_gated", "hidden"), None, when=when),
        *linear_rows(SHARED + "linear_fc2", (f"{hf}.down_proj",), Kind.ROW, ("hidden", "shared_ffn"), None, when=when),
        *((Weight(name, (f"{HF_LAYER}{gate}",), Kind.REPLICATED, ("one", "hidden"), when=gated),) if gate else ()),
    )


def latent_attention_rows() -> Rows:
    """DeepSeek's latent attention. The down projections are held whole by every rank, as upstream holds them."""
    plain, low_rank = ("!q_lora_rank",), ("q_lora_rank",)

    def row(name: str, hf: str, kind: Kind, shape: tuple[str, str], when: tuple[str, ...] = ()) -> Rows:
        return linear_rows(f"self_attention.{name}", (f"self_attn.{hf}",), kind, shape, None, when=when)

    return (
        *row("linear_proj", "o_proj", Kind.ROW, ("hidden", "query")),
        *row("linear_q_proj", "q_proj", Kind.COLUMN, ("q_up", "hidden"), plain),
        *row("linear_q_down_proj", "q_a_proj", Kind.REPLICATED, ("q_lora", "hidden"), low_rank),
        *row("linear_q_up_proj", "q_b_proj", Kind.COLUMN, ("q_up", "q_lora"), low_rank),
        *row("linear_kv_down_proj", "kv_a_proj_with_mqa", Kind.REPLICATED, ("kv_down", "hidden")),
        *row("linear_kv_up_proj", "kv_b_proj", Kind.COLUMN, ("kv_up", "kv_lora")),
        norm_row("self_attention.q_layernorm", "self_attn.q_a_layernorm", "q_lora", low_rank),
        norm_row("self_attention.kv_layernorm", "self_attn.kv_a_layernorm", "kv_lora"),
    )


def layer_rows(attention: Rows, *mlp: Rows) -> Rows:
    """A layer: norm, attention, norm, and what stands in place of the MLP (several rows with their conditions)."""
    return (
        norm_row("input_layernorm", "input_layernorm"),
        *attention,
        norm_row("pre_mlp_layernorm", "post_attention_layernorm"),
        *(row for rows in mlp for row in rows),
    )


def dense_rows() -> Rows:
    """The gated MLP of the layers that have no experts."""
    return mlp_rows(GATE_UP, when=("!moe",))


def network_rows(layer: Rows, prediction: Rows = ()) -> Rows:
    """The table of a model whose layers have these rows, and whose prediction layers, if any, have those."""
    return (embedding_row(), *layer, *prediction, *final_rows())


def prediction_rows(layer: Rows) -> Rows:
    """Multi-token-prediction layers in DeepSeek's hub names: they follow the last layer, each with a layer of its own.

    Args:
        layer: the rows of an ordinary layer.
    """

    def own(name: str, hf: str, kind: Kind, *shape: str) -> Weight:
        return Weight(f"{PREDICTION}{name}.weight", (f"{HF_LAYER}{hf}.weight",), kind, shape)

    inner = PREDICTION + "transformer_layer."
    return (
        own("enorm", "enorm", Kind.REPLICATED, "hidden"),
        own("hnorm", "hnorm", Kind.REPLICATED, "hidden"),
        own("eh_proj", "eh_proj", Kind.COLUMN, "hidden", "two_hidden"),
        *(dataclasses.replace(row, name=row.name.replace(LAYER, inner, 1)) for row in layer),
        own("final_layernorm", "shared_head.norm", Kind.REPLICATED, "hidden"),
        own("embed_tokens", "embed_tokens", Kind.VOCAB, "vocab", "hidden"),
        own("output_layer", "shared_head.head", Kind.VOCAB, "vocab", "hidden"),
    )


def either(*keys: str, default: Any = REQUIRED) -> Derived:
    """The first of these keys that config.json has, else `default`; `KeyError` with the first name without one."""

    def value(flat: Mapping[str, Any]) -> Any:
        found = [flat[key] for key in keys if flat.get(key) is not None]
        if not found and default is REQUIRED:
            raise KeyError(keys[0])
        return found[0] if found else default

    return value


def sparse_layers(flat: Mapping[str, Any]) -> tuple[int, ...]:
    """`moe_layers` of the Qwen families: every decoder_sparse_step-th layer that is not in mlp_only_layers."""
    step, dense = flat.get("decoder_sparse_step") or 1, flat.get("mlp_only_layers") or ()
    return tuple(n for n in range(flat["num_hidden_layers"]) if n not in dense and (n + 1) % step == 0)


def layers_after_dense(default: int) -> Derived:
    """`moe_layers` of the DeepSeek families: all but the first first_k_dense_replace ones.

    Args:
        default: of the family's transformers class.
    """
    return lambda flat: tuple(range(flat.get("first_k_dense_replace", default), flat["num_hidden_layers"]))


def every_layer(flat: Mapping[str, Any]) -> tuple[int, ...]:
    """`moe_layers` of a family in which every layer has experts."""
    return tuple(range(flat["num_hidden_layers"]))


def shared_size(default: int) -> Derived:
    """`moe_shared_ffn_hidden_size` of the DeepSeek families, n_shared_experts x moe_intermediate_size.

    Args:
        default: n_shared_experts of the family's transformers class.
    """
    return lambda flat: (flat.get("n_shared_experts", default) or 0) * flat["moe_intermediate_size"]


def latent_keys() -> dict[str, HfKey | Derived]:
    """The fields of latent attention, which DeepSeek's configs name alike."""
    return {
        "num_query_groups": lambda flat: flat["num_attention_heads"],
        "kv_channels": query_head_size,
        "q_lora_rank": lambda flat: flat.get("q_lora_rank", 1536) or 0,
        "kv_lora_rank": HfKey("kv_lora_rank", 512),
        "qk_head_dim": HfKey("qk_nope_head_dim", 128),
        "qk_pos_emb_head_dim": HfKey("qk_rope_head_dim", 64),
        "v_head_dim": HfKey("v_head_dim", 128),
        "attention_scale": latent_attention_scale,
    }


def query_head_size(flat: Mapping[str, Any]) -> int:
    """Size of a query head under latent attention: its plain and its rotated part."""
    return flat.get("qk_nope_head_dim", 128) + flat.get("qk_rope_head_dim", 64)


def latent_attention_scale(flat: Mapping[str, Any]) -> float | None:
    """`attention_scale` under latent attention: yarn's mscale_all_dim multiplies q and k alike; None without."""
    scaling = flat.get("rope_scaling") or {}
    factor, mscale = scaling.get("factor", 1.0), scaling.get("mscale_all_dim", 0)
    if not mscale or factor <= 1:
        return None
    return query_head_size(flat) ** -0.5 * (0.1 * mscale * math.log(factor) + 1.0) ** 2


GROUPED_ATTENTION = attention_rows()
