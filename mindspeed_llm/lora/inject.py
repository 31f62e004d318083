"""Put adapters into a live model: inject, freeze the base, initialise by logical names."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mindspeed_llm.checkpoint.adapters.parts import adapted_rows
from mindspeed_llm.checkpoint.formats.lazy import InMemory, part_of
from mindspeed_llm.checkpoint.metadata import LoraSettings, short_name
from mindspeed_llm.checkpoint.tables import EMBEDDING, MAGNITUDE, OUTPUT_LAYER, WeightTable, is_lora, logical_name
from mindspeed_llm.lora.fused_attention import AdaptedAttention
from mindspeed_llm.lora.fused_mlp import AdaptedMlp
from mindspeed_llm.lora.grouped import group_adapters
from mindspeed_llm.lora.layers import (
    ColumnParallelLora,
    ParallelLora,
    ReplicatedLora,
    RowParallelLora,
    is_lora_parameter,
    uniform_init,
)
from mindspeed_llm.lora.lookups import EmbeddingLora, RouterLora, normal_init
from mindspeed_llm.lora.pissa import shared_factors
from mindspeed_llm.models import parallel
from mindspeed_llm.models.attention import RotarySelfAttention
from mindspeed_llm.models.linear import ReplicatedLinear
from mindspeed_llm.models.mlp import GatedMLP
from mindspeed_llm.models.moe import Router

CUSTOM_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    ColumnParallelLinear: ColumnParallelLora,
    RowParallelLinear: RowParallelLora,
    ReplicatedLinear: ReplicatedLora,
    Router: RouterLora,
    VocabParallelEmbedding: EmbeddingLora,
}
"""megatron-core's modules, and ours, that get an adapter, and its type."""


def inject(
    chunks: Sequence[nn.Module],
    settings: LoraSettings,
    fused: bool,
    seed: int,
    fused_mlp: bool = False,
    fresh: bool = True,
) -> None:
    """Adapt the target layers of every model chunk in place; only adapters and what is trained whole stay trainable.

    A is drawn for its whole logical shape from a generator seeded by (seed, logical name) and cut afterwards, so
    training starts from the same values at every TP, PP and DP; B starts at zero. PiSSA's factors and DoRA's lengths
    come from the base's weights, which have to be loaded before.

    Args:
        chunks: this rank's model chunks; each carries `first_layer`.
        fused: use the fused autograd function (`--lora-fusion`).
        seed: of A's values.
        fused_mlp: compute whole SwiGLU MLPs in one such function where both layers are adapted (`--use-fused-mlp`).
        fresh: give the adapters their initial values; False leaves them for a saved adapter to fill.
    """
    for chunk in chunks:
        config = peft_config(chunk, settings)
        if config.target_modules:  # a stage may hold none of single layers that are adapted
            config._register_custom_module(CUSTOM_MODULES)
            inject_adapter_in_model(config, chunk)
        for name, layer in adapters_by_name(chunk).items():
            layer.adopt(settings, name)
            layer.use_fused = fused
        hold_parts(chunk, settings)
        group_adapters(chunk)
        set_trainable(chunk, settings)
        for attention in attentions(chunk) if fused else ():
            attention.whole = AdaptedAttention(attention.linear_qkv, attention.linear_proj)
        for mlp in gated_mlps(chunk) if fused_mlp else ():
            mlp.whole = AdaptedMlp(mlp.linear_fc1, mlp.linear_fc2) if AdaptedMlp.fits(mlp) else None
        if fresh:
            initialise(chunk, settings, seed)


def adapters_by_name(chunk: nn.Module) -> dict[str, ParallelLora]:
    """A chunk's adapters by their layers' logical names."""
    first_expert = parallel.expert_place(chunk.config.num_moe_experts or 0)[0]
    return {
        logical_name(name, chunk.first_layer, first_expert=first_expert): module
        for name, module in chunk.named_modules()
        if isinstance(module, ParallelLora)
    }


def hold_parts(chunk: nn.Module, settings: LoraSettings) -> None:
    """Adapt only those rows of fused layers that belong to adapted projections."""
    table = WeightTable(chunk.model) if settings.parts else None
    for module, layer in adapters_by_name(chunk).items() if table else ():
        rows = adapted_rows(settings, module, table.entries[f"{module}.weight"])
        if rows is not None:
            axis = table.shard_map(f"{module}.{MAGNITUDE}.weight", layer.group.size())
            layer.adapt_only(part_of(InMemory(rows).read, axis, layer.group.rank()))


def set_trainable(chunk: nn.Module, settings: LoraSettings) -> None:
    """Freeze everything but adapters and the weights of modules that are trained whole.

    The last pipeline stage's copy of a tied embedding is trained with the embedding.
    """
    first_expert = parallel.expert_place(chunk.config.num_moe_experts or 0)[0]
    tied = getattr(chunk, "share_embeddings_and_output_weights", False)
    for name, parameter in chunk.named_parameters():
        logical = logical_name(name, chunk.first_layer, first_expert=first_expert)
        logical = EMBEDDING if tied and logical == OUTPUT_LAYER else logical
        saved = logical.endswith(".weight") and settings.saves(logical.removesuffix(".weight"))
        parameter.requires_grad_(is_lora_parameter(name) or (saved and not is_lora(logical)))


def peft_config(chunk: nn.Module, settings: LoraSettings) -> LoraConfig:
    """`settings` for one chunk, in peft's words: its own names of the layers, and other ranks and alphas by name."""
    first_expert = parallel.expert_place(chunk.config.num_moe_experts or 0)[0]
    names = {}
    for local, module in chunk.named_modules():
        if isinstance(module, tuple(CUSTOM_MODULES)):
            weight = logical_name(f"{local}.weight", chunk.first_layer, first_expert=first_expert)
            names[weight.removesuffix(".weight")] = local
    adapted = {logical: local for logical, local in names.items() if settings.adapts(logical)}
    kinds = {short_name(local) for logical, local in adapted.items() if logical not in settings.target_modules}
    single = {local for logical, local in adapted.items() if logical in settings.target_modules}
    ranks = {local: settings.rank(logical) for logical, local in adapted.items()}
    alphas = {local: settings.alpha_of(logical) for logical, local in adapted.items()}
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules=sorted(kinds | single),
        rank_pattern={re.escape(local): rank for local, rank in ranks.items() if rank != settings.r},
        alpha_pattern={re.escape(local): alpha for local, alpha in alphas.items() if alpha != settings.alpha},
        init_lora_weights=False,
        lora_dropout=settings.dropout,
    )


def attentions(module: nn.Module) -> list[RotarySelfAttention]:
    """All attentions below `module` that can be computed chunk by chunk."""
    return [one for one in module.modules() if isinstance(one, RotarySelfAttention) and AdaptedAttention.fits(one)]


def gated_mlps(module: nn.Module) -> list[GatedMLP]:
    """All dense MLPs below `module`."""
    return [one for one in module.modules() if isinstance(one, GatedMLP)]


def initialise(chunk: nn.Module, settings: LoraSettings, seed: int) -> None:
    """Give a chunk's adapters their first values; collective over TP.

    A is drawn by its logical name and B is zero, or both come from the base's singular vectors (PiSSA). DoRA's lengths
    are those of the base's rows: the adapters change nothing yet.
    """
    table = WeightTable(chunk.model) if settings.init == "pissa" else None
    for module, layer in adapters_by_name(chunk).items():
        name = layer.active_adapters[0]
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        with torch.no_grad():
            if table is not None:
                weight, rows = layer.base_layer.weight, layer.adapted_rows
                weight = weight if rows is None else weight * rows.unsqueeze(1)
                axis = table.shard_map(f"{module}.weight", layer.group.size())
                found = shared_factors(weight, a.size(0), layer.scaling[name], axis, layer.group)
                for factor, value in zip((a, b), found, strict=True):
                    factor.copy_(value)
                layer.lora_A_start[name].weight.copy_(a)
                layer.lora_B_start[name].weight.copy_(b)
            else:
                a.copy_(drawn_share(layer, module, a.size(0), seed))
                b.zero_()
            if settings.use_dora:
                layer.lora_magnitude_vector[name].weight.copy_(layer.row_norms(*layer.factors()))


def drawn_share(layer: ParallelLora, module: str, r: int, seed: int) -> torch.Tensor:
    """This rank's share of A's initial values, fp32; `module` is the layer's logical name."""
    digest = hashlib.sha256(f"{seed}:{module}".encode()).digest()
    if isinstance(layer, EmbeddingLora):
        return normal_init((r, layer.in_features), int.from_bytes(digest[:6], "big"))
    split = layer.group.size() if isinstance(layer, RowParallelLora) else 1
    width = layer.in_features
    whole = uniform_init((r, width * split), int.from_bytes(digest[:6], "big"))
    start = width * layer.group.rank() if split > 1 else 0
    return whole[:, start : start + width]


def give_recompute_a_gradient(chunks: Sequence[nn.Module]) -> None:
    """Make the embedding's output require a gradient.

    With every base weight frozen nothing before the first adapter asks for one, and megatron-core's full
    recomputation then runs its layers without recording them: the adapters would silently get no gradient.
    """

    def require(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.requires_grad_(True) if torch.is_grad_enabled() and not output.requires_grad else output

    for chunk in chunks:
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(require)
