"""LoRA settings: what is taken from the command line, and what is refused."""

import pytest

from mindspeed_llm.arguments.lora import LoraOptions
from mindspeed_llm.errors import UsageError
from mindspeed_llm.lora.config import TARGETS, continued, create_settings, for_model, settings_from_options
from mindspeed_llm.models.config import ModelConfig
from tests.checkpoint.families import hf_values


def test_no_targets_mean_no_adapter() -> None:
    assert settings_from_options(LoraOptions()) is None


def test_rank_and_alpha_have_upstreams_defaults() -> None:
    settings = settings_from_options(LoraOptions(lora_target_modules=["linear_qkv"]))
    assert (settings.r, settings.alpha, settings.target_modules) == (16, 32, ("linear_qkv",))
    assert settings.scaling("decoder.layers.0.mlp.linear_fc1") == 2.0


def test_given_values_are_kept_and_repeated_targets_count_once() -> None:
    options = LoraOptions(lora_r=3, lora_alpha=7, lora_target_modules=["linear_fc2", "linear_qkv", "linear_fc2"])
    settings = settings_from_options(options)
    assert (settings.r, settings.alpha, settings.target_modules) == (3, 7, ("linear_fc2", "linear_qkv"))
    assert settings.scaling("decoder.layers.0.mlp.linear_fc1") == 7 / 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LoraOptions(lora_r=8), "--lora-r given without --lora-target-modules.*linear_qkv"),
        (LoraOptions(lora_alpha=8), "--lora-alpha given without --lora-target-modules"),
        (LoraOptions(lora_r=8, lora_alpha=8), "--lora-r and --lora-alpha given without"),
        (LoraOptions(lora_target_modules=["linear_qkw"]), "linear_qkw.*linear_qkv"),
        (LoraOptions(lora_r=0, lora_target_modules=["linear_qkv"]), "--lora-r must be at least 1, not 0"),
        (LoraOptions(lora_r=-2, lora_target_modules=["linear_qkv"]), "not -2"),
        (LoraOptions(lora_dropout=0.1), "--lora-dropout given without --lora-target-modules"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(options: LoraOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_from_options(options)


def test_an_adapter_needs_a_target() -> None:
    with pytest.raises(UsageError, match=f"--lora-target-modules is empty; known: {TARGETS[0]}"):
        create_settings(4, 8, ())


def test_a_saved_adapters_dropout_is_kept_unless_another_is_given() -> None:
    saved = create_settings(4, 8, ("linear_qkv",), 0.25)
    assert continued(saved, LoraOptions()).dropout == 0.25
    assert continued(saved, LoraOptions(lora_dropout=0.0)).dropout == 0.0
    assert settings_from_options(LoraOptions(lora_target_modules=["linear_qkv"], lora_dropout=0.1)).dropout == 0.1


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("deepseek_v3", ("linear_proj", "linear_q_down_proj", "linear_kv_down_proj", "linear_fc1")),
        ("qwen3_moe", ("linear_proj", "linear_qkv", "linear_fc1")),
    ],
)
def test_upstreams_qkv_is_both_down_projections_of_latent_attention(family: str, named: tuple[str, ...]) -> None:
    given = create_settings(3, 6, ("linear_proj", "linear_qkv", "linear_fc1"))
    assert for_model(given, ModelConfig.from_hf_dict(hf_values(family), family)).target_modules == named
    assert for_model(None, ModelConfig.from_hf_dict(hf_values(family), family)) is None
