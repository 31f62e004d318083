"""LoRA settings: what is taken from the command line, and what is refused."""

import pytest

from mindspeed_llm.arguments.lora import LoraOptions
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.errors import UsageError
from mindspeed_llm.lora.config import check_given, continued, settings_from_options
from mindspeed_llm.models.config import ModelConfig
from tests.checkpoint.families import hf_values

LAYERS = 4
QKV = {"lora_target_modules": ["linear_qkv"]}


def table(family: str = "qwen3", **more: object) -> WeightTable:
    return WeightTable(ModelConfig.from_hf_dict({**hf_values(family), **more}, family))


def settings(*targets: str, family: str = "qwen3", **more: object):
    return settings_from_options(LoraOptions(lora_target_modules=list(targets), **more), table(family))


def test_no_targets_mean_no_adapter() -> None:
    assert settings_from_options(LoraOptions(), table()) is None


def test_rank_and_alpha_have_upstreams_defaults() -> None:
    found = settings("linear_qkv")
    assert (found.r, found.alpha, found.target_modules) == (16, 32, ("linear_qkv",))
    assert found.scaling("decoder.layers.0.mlp.linear_fc1") == 2.0


def test_given_values_are_kept_and_repeated_targets_count_once() -> None:
    found = settings("linear_fc2", "linear_qkv", "linear_fc2", lora_r=3, lora_alpha=7)
    assert (found.r, found.alpha, found.target_modules) == (3, 7, ("linear_fc2", "linear_qkv"))
    assert found.scaling("decoder.layers.0.mlp.linear_fc1") == 7 / 3


ALL = ("linear_fc1", "linear_fc2", "linear_proj", "linear_qkv")


@pytest.mark.parametrize(
    ("targets", "more", "expected"),
    [
        (("all-linear",), {}, ALL),
        (("q_proj", "k_proj", "v_proj", "down_proj"), {}, ("linear_fc2", "linear_qkv")),
        (("self_attn.o_proj",), {}, ("linear_proj",)),
        ((r"model\.layers\.\d+\.mlp\..*",), {}, ("linear_fc1", "linear_fc2")),
        ((r".*\.[02]\.mlp\.linear_fc1",), {}, ("decoder.layers.0.mlp.linear_fc1", "decoder.layers.2.mlp.linear_fc1")),
        (("decoder.layers.3.mlp.linear_fc1",), {}, ("decoder.layers.3.mlp.linear_fc1",)),
        (("all-linear",), {"lora_exclude_modules": ["o_proj", ".*mlp.*"]}, ("linear_qkv",)),
        (("linear_fc2",), {"lora_layers": [1, 1]}, ("decoder.layers.1.mlp.linear_fc2",)),
        (("linear_fc2",), {"lora_layers": list(range(LAYERS))}, ("linear_fc2",)),
        (("all-embedding", "linear_fc2"), {}, ("linear_fc2", "word_embeddings")),
        (("model.embed_tokens",), {"lora_layers": [1]}, ("word_embeddings",)),
        (("word_embeddings", "all-linear"), {"lora_exclude_modules": [".*mlp.*", "linear_proj"]},
         ("linear_qkv", "word_embeddings")),
    ],
)  # fmt: skip
def test_targets_are_named_in_both_worlds_by_expressions_and_layers(
    targets: tuple[str, ...], more: dict, expected: tuple[str, ...]
) -> None:
    assert settings(*targets, **more).target_modules == expected


PARTS = {"linear_qkv": ("q_proj", "v_proj")}
FIRST = {f"decoder.layers.{layer}.self_attention.linear_qkv": ("q_proj", "v_proj") for layer in (0, 2)}


@pytest.mark.parametrize(
    ("targets", "more", "expected"),
    [
        (("q_proj", "v_proj"), {}, PARTS),
        (("q_proj", "v_proj", "down_proj"), {"lora_layers": [1]}, PARTS),
        ((r"model\.layers\.[02]\.self_attn\.[qv]_proj", "layers.1.self_attention.linear_qkv"), {}, FIRST),
        (("all-linear",), {"lora_exclude_modules": ["k_proj", "gate_proj"]}, {**PARTS, "linear_fc1": ("up_proj",)}),
        (("q_proj", "linear_qkv"), {}, {}),
        (("q_proj", "k_proj", "v_proj"), {}, {}),
    ],
)
def test_parts_of_a_fused_layer_are_targets_of_their_own(
    targets: tuple[str, ...], more: dict, expected: dict[str, tuple[str, ...]]
) -> None:
    assert settings(*targets, **more).parts == expected


def test_parts_of_experts_are_refused() -> None:
    with pytest.raises(UsageError, match="names up_proj, but gate_proj up_proj are one layer .* experts' as one"):
        settings("up_proj", family="qwen3_moe")


def test_the_first_pattern_that_fits_gives_a_layers_rank_and_alpha() -> None:
    found = settings(
        "all-linear",
        lora_r=4,
        lora_alpha=8,
        use_rslora=True,
        lora_rank_pattern=[r".*layers\.2\.mlp\.down_proj=9", "linear_fc2=2"],
        lora_alpha_pattern=["q_proj=1.5"],
    )
    ranks = [found.rank(f"decoder.layers.{layer}.mlp.linear_fc2") for layer in range(LAYERS)]
    assert ranks == [2, 2, 9, 2]
    assert found.scaling("decoder.layers.1.self_attention.linear_qkv") == 1.5 / 4**0.5
    assert found.scaling("decoder.layers.2.mlp.linear_fc2") == 8 / 9**0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 8}, "--lora-r given without --lora-target-modules.*linear_qkv"),
        ({"lora_alpha": 8}, "--lora-alpha given without --lora-target-modules"),
        ({"lora_r": 8, "lora_alpha": 8}, "--lora-r and --lora-alpha given without"),
        ({"lora_dropout": 0.1}, "--lora-dropout given without --lora-target-modules"),
        ({"use_dora": True}, "--use-dora given without --lora-target-modules"),
        ({"lora_target_modules": ["linear_qkw"]}, "linear_qkw.*linear_qkv"),
        ({"lora_target_modules": ["(linear"]}, "not a regular expression"),
        ({"lora_target_modules": ["all-linear", "lm_head"]}, "output layer gets no adapter .*-to-save lm_head"),
        ({"lora_target_modules": ["all-linear", "all-router"]}, "entry 'all-router'"),
        ({"lora_target_modules": ["embed_tokens"], "use_dora": True}, "--use-dora is for linear layers.* all-embedd"),
        ({"lora_target_modules": ["all-embedding"], "lora_init": "pissa"}, "--lora-init pissa is for linear layers"),
        ({**QKV, "lora_exclude_modules": ["linear_qkv"]}, "leave no layer to adapt"),
        ({**QKV, "lora_exclude_modules": ["fc1"]}, "--lora-exclude-modules entry 'fc1'"),
        ({**QKV, "lora_layers": [1, 7]}, "--lora-layers 7: .*0 to 3"),
        ({**QKV, "lora_rank_pattern": ["linear_qkv"]}, "expected NAME=NUMBER"),
        ({**QKV, "lora_rank_pattern": ["linear_qkv=1.5"]}, "'1.5' is no rank"),
        ({**QKV, "lora_rank_pattern": ["linear_fc1=2"]}, "name 'linear_fc1'.*linear_qkv"),
        ({**QKV, "lora_alpha_pattern": ["linear_qkv=nan"]}, "'nan' is no alpha"),
        ({**QKV, "lora_modules_to_save": ["linear_qkv"]}, "both name .*linear_qkv"),
        ({**QKV, "lora_modules_to_save": ["up_proj"]}, "names up_proj, but gate_proj up_proj are one layer .* as one"),
        ({**QKV, "lora_modules_to_save": ["norms"]}, "--lora-modules-to-save entry"),
    ],
)  # fmt: skip
def test_settings_that_make_no_adapter_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_from_options(LoraOptions(**options), table())


def test_a_tied_output_layer_is_trained_whole_by_the_embeddings_name() -> None:
    tied = table(tie_word_embeddings=True)
    options = LoraOptions(lora_target_modules=["linear_qkv"], lora_modules_to_save=["lm_head"])
    with pytest.raises(UsageError, match="output layer is its embedding; name embed_tokens"):
        settings_from_options(options, tied)
    options.lora_modules_to_save = ["embed_tokens"]
    assert settings_from_options(options, tied).modules_to_save == ("word_embeddings",)


@pytest.mark.parametrize("target", ["all-router", "router", "mlp.gate", "gate"])
def test_routers_are_named_in_both_worlds(target: str) -> None:
    assert settings(target, family="qwen3_moe").target_modules == ("router",)
    with pytest.raises(UsageError, match="--use-dora is for linear layers, .* router is none"):
        settings(target, "linear_qkv", family="qwen3_moe", use_dora=True)


def test_dora_of_experts_is_refused() -> None:
    with pytest.raises(UsageError, match="--use-dora: .*local_experts.0.linear_fc1 is an expert's"):
        settings("all-linear", family="qwen3_moe", use_dora=True)
    assert settings("linear_qkv", family="qwen3_moe", use_dora=True).use_dora


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loraplus_lr_ratio": 0.0}, "--loraplus-lr-ratio 0: must be a number above 0"),
        ({"use_dora": True, "lora_init": "pissa"}, "--use-dora and --lora-init pissa exclude"),
    ],
)
def test_values_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LoraOptions(**options).check()


def test_a_saved_adapters_dropout_is_kept_unless_another_is_given() -> None:
    saved = settings("linear_qkv", lora_dropout=0.25)
    assert continued(saved, LoraOptions()).dropout == 0.25
    assert continued(saved, LoraOptions(lora_dropout=0.0)).dropout == 0.0
    assert continued(saved, LoraOptions(lora_dtype="float32")).dtype == "float32"


def test_options_that_contradict_a_saved_adapter_are_named() -> None:
    saved = settings("linear_qkv", use_dora=True, lora_layers=[1])
    check_given(saved, LoraOptions(use_dora=True), table(), "folder")
    check_given(saved, LoraOptions(lora_target_modules=["linear_qkv"], lora_layers=[1]), table(), "folder")
    for options, message in (
        (LoraOptions(use_rslora=True), "--use-rslora True contradicts the saved adapter in folder"),
        (LoraOptions(lora_init="pissa"), "--lora-init pissa contradicts"),
        (LoraOptions(lora_target_modules=["linear_qkv"], lora_layers=[2]), "with its exclusions contradicts"),
        (LoraOptions(lora_target_modules=["q_proj"], lora_layers=[1]), "with its exclusions contradicts"),
    ):
        with pytest.raises(UsageError, match=message):
            check_given(saved, options, table(), "folder")


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("deepseek_v3", ("linear_fc1", "linear_kv_down_proj", "linear_proj", "linear_q_down_proj")),
        ("qwen3_moe", ("linear_fc1", "linear_proj", "linear_qkv")),
    ],
)
def test_upstreams_qkv_is_both_down_projections_of_latent_attention(family: str, named: tuple[str, ...]) -> None:
    assert settings("linear_proj", "linear_qkv", "linear_fc1", family=family).target_modules == named
