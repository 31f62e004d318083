"""Put adapters into a live model: inject, freeze the base, initialise by logical names."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mindspeed_llm.checkpoint.metadata import LoraSettings, short_name
from mindspeed_llm.checkpoint.tables import logical_name
from mindspeed_llm.lora.fused_mlp import AdaptedMlp
from mindspeed_llm.lora.layers import CUSTOM_MODULES, RowParallelLora, is_lora_parameter, lora_layers, uniform_init
from mindspeed_llm.models import parallel
from mindspeed_llm.models.mlp import GatedMLP


def inject(
    chunks: Sequence[nn.Module], settings: LoraSettings, fused: bool, seed: int, fused_mlp: bool = False
) -> None:
    """Adapt the target layers of every model chunk in place; only adapter parameters stay trainable.

    A is drawn for its whole logical shape from a generator seeded by (seed, logical name) and cut afterwards, so
    training starts from the same values at every TP, PP and DP; B starts at zero.

    Args:
        chunks: this rank's model chunks; each carries `first_layer`.
        fused: use the fused autograd function (`--lora-fusion`).
        seed: of A's values.
        fused_mlp: compute whole SwiGLU MLPs in one such function where both layers are adapted (`--use-fused-mlp`).
    """
    for chunk in chunks:
        config = peft_config(chunk, settings)
        if config.target_modules:  # a stage may hold none of single layers that are adapted
            config._register_custom_module(CUSTOM_MODULES)
            inject_adapter_in_model(config, chunk)
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(is_lora_parameter(name))
        for layer in lora_layers(chunk):
            layer.use_fused = fused
        for mlp in gated_mlps(chunk) if fused_mlp else ():
            mlp.whole = AdaptedMlp(mlp.linear_fc1, mlp.linear_fc2) if AdaptedMlp.fits(mlp) else None
        initialise(chunk, seed)


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


def gated_mlps(module: nn.Module) -> list[GatedMLP]:
    """All dense MLPs below `module`."""
    return [one for one in module.modules() if isinstance(one, GatedMLP)]


def initialise(chunk: nn.Module, seed: int) -> None:
    """Draw every A by its logical name and set every B to zero."""
    first_expert = parallel.expert_place(chunk.config.num_moe_experts or 0)[0]
    for name, module in chunk.named_modules():
        if not isinstance(module, tuple(CUSTOM_MODULES.values())):
            continue
        logical = logical_name(name, chunk.first_layer, first_expert=first_expert)
        digest = hashlib.sha256(f"{seed}:{logical}".encode()).digest()
        for a, b in zip(module.lora_A.values(), module.lora_B.values(), strict=True):
            split = module.group.size() if isinstance(module, RowParallelLora) else 1
            width = module.in_features
            whole = uniform_init((a.out_features, width * split), int.from_bytes(digest[:6], "big"))
            start = width * module.group.rank() if split > 1 else 0
            with torch.no_grad():
                a.weight.copy_(whole[:, start : start + width])
                b.weight.zero_()


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
