"""LoRA settings: what is adapted, how strongly; recorded in every checkpoint so that nobody retypes them."""

from collections.abc import Sequence
from dataclasses import replace

from mindspeed_llm.arguments.lora import TARGET_MODULES as TARGETS
from mindspeed_llm.arguments.lora import LoraOptions
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.errors import UsageError, unknown
from mindspeed_llm.models.config import ModelConfig

DEFAULT_RANK = 16
DEFAULT_ALPHA = 32


def create_settings(r: int, alpha: float, target_modules: Sequence[str], dropout: float = 0.0) -> LoraSettings:
    """Checked settings of Y = X W^T + (alpha / r) (X A^T) B^T (Hu et al., arXiv 2106.09685).

    Raises:
        UsageError: a rank below one, an unknown target or none at all.
    """
    if r < 1:
        raise UsageError(f"--lora-r must be at least 1, not {r}")
    if not target_modules:
        raise UsageError(f"--lora-target-modules is empty; known: {' '.join(TARGETS)}")
    for target in target_modules:
        if target not in TARGETS:
            raise unknown("--lora-target-modules entry", target, TARGETS)
    return LoraSettings(r, alpha, tuple(dict.fromkeys(target_modules)), dropout)


def for_model(settings: LoraSettings | None, model: ModelConfig) -> LoraSettings | None:
    """The settings with a model's own names of its layers.

    Under latent attention `linear_qkv` is upstream's name of the two projections of the hidden state.
    """
    if settings is None or not model.multi_latent_attention or "linear_qkv" not in settings.target_modules:
        return settings
    down = ("linear_q_down_proj" if model.q_lora_rank else "linear_q_proj", "linear_kv_down_proj")
    named = (down if target == "linear_qkv" else (target,) for target in settings.target_modules)
    return replace(settings, target_modules=tuple(dict.fromkeys(name for names in named for name in names)))


def settings_from_options(options: LoraOptions) -> LoraSettings | None:
    """Settings of a new adapter from the command line; None when no targets are given, which means no LoRA.

    Raises:
        UsageError: a rank, alpha or fusion without targets, and `create_settings`'s.
    """
    if not options.lora_target_modules:
        given = [
            flag
            for flag, value in (
                ("--lora-r", options.lora_r),
                ("--lora-alpha", options.lora_alpha),
                ("--lora-dropout", options.lora_dropout or None),
            )
            if value is not None
        ]
        if given:
            raise UsageError(f"{' and '.join(given)} given without --lora-target-modules; known: {' '.join(TARGETS)}")
        return None
    return create_settings(
        DEFAULT_RANK if options.lora_r is None else options.lora_r,
        DEFAULT_ALPHA if options.lora_alpha is None else options.lora_alpha,
        options.lora_target_modules,
        options.lora_dropout or 0.0,
    )


def continued(settings: LoraSettings, options: LoraOptions) -> LoraSettings:
    """Settings of a saved adapter that is trained on: its own, but for a dropout that the command line gives."""
    return settings if options.lora_dropout is None else replace(settings, dropout=options.lora_dropout)
