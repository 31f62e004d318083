"""Families: config mappings and weight tables, held against transformers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.models.config import ModelConfig, check_architecture_flags
from mindspeed_llm.models.families import FAMILIES, family
from tests.checkpoint.tiny import hf_config


def write_config(folder: Path, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps({**hf_config(), **changes}))
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_has_exactly_the_tensors_and_shapes_of_transformers(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    write_config(tmp_path, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    table = WeightTable(ModelConfig.from_hf(tmp_path))
    assert {hf: entry.hf_shape(part) for hf, (entry, part) in table.hf_names.items()} == expected


def test_a_config_written_by_transformers_5_reads_like_one_with_the_older_keys(tmp_path: Path) -> None:
    from transformers import AutoConfig

    old = write_config(tmp_path)
    (tmp_path / "new").mkdir()
    AutoConfig.from_pretrained(old).save_pretrained(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "rope_parameters" in written and "dtype" in written
    assert ModelConfig.from_hf(tmp_path / "new") == ModelConfig.from_hf(old)


def test_keys_left_out_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    from transformers import Qwen3Config

    raw = hf_config()
    for key in ("head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "torch_dtype"):
        del raw[key]
    config, reference = ModelConfig.from_hf_dict(raw, "here"), Qwen3Config()
    assert config.kv_channels == reference.head_dim
    assert config.norm_epsilon == reference.rms_norm_eps
    assert config.max_position_embeddings == reference.max_position_embeddings
    assert config.tie_word_embeddings == reference.tie_word_embeddings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", {"rope_type": "mystery", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_parameters", {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}),
        ("layer_types", ["sliding_attention"] * 4),
        ("layer_types", ["sliding_attention", "chunked_attention"] * 2),
    ],
)
def test_a_feature_the_family_cannot_express_is_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="hidden_act|partial_rotary|mystery|low_freq|local_base|slide|chunked"
    ) as error:
        ModelConfig.from_hf(write_config(tmp_path, **{key: value}))
    assert str(tmp_path) in str(error.value)


def test_rope_scaling_of_type_default_changes_nothing(tmp_path: Path) -> None:
    parameters = {"rope_type": "default", "rope_theta": 123.0}
    assert ModelConfig.from_hf(write_config(tmp_path, rope_parameters=parameters)).rotary_base == 123.0


def test_missing_and_broken_configs_are_input_errors_naming_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config.json: no such file"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        ModelConfig.from_hf(tmp_path)
    raw = hf_config()
    del raw["num_hidden_layers"]
    with pytest.raises(InputError, match="num_hidden_layers"):
        ModelConfig.from_hf_dict(raw, "here")


def test_an_unknown_architecture_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Qwen3ForCausalLM"):
        ModelConfig.from_hf(write_config(tmp_path, architectures=["NobodyForCausalLM"]))


def test_an_unknown_family_name_offers_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'qwen3'"):
        family("qwen33")


def test_a_config_survives_its_dict(tmp_path: Path) -> None:
    config = ModelConfig.from_hf(write_config(tmp_path))
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.hf_config == config.hf_config
    with pytest.raises(InputError, match="unknown fields"):
        ModelConfig.from_dict({**config.to_dict(), "surprise": 1})


def test_agreeing_architecture_flags_pass_and_contradicting_ones_name_both_values() -> None:
    config = ModelConfig.from_hf_dict(hf_config(), "here")
    agreeing = SimpleNamespace(num_layers=4, kv_channels=10, rotary_base=5000, swiglu=True, norm_epsilon=None)
    check_architecture_flags(config, agreeing)
    wrong = SimpleNamespace(num_layers=36, norm_epsilon=1e-5, untie_embeddings_and_output_weights=True)
    with pytest.raises(UsageError) as error:
        check_architecture_flags(config, wrong, "here")
    message = str(error.value)
    assert "--num-layers says 36, the model says 4" in message
    assert "--norm-epsilon says 1e-05, the model says 1e-06" in message
    assert "untie" not in message and "here" in message


def test_a_padded_vocabulary_may_be_larger_but_not_smaller() -> None:
    config = ModelConfig.from_hf_dict(hf_config(), "here")
    check_architecture_flags(config, SimpleNamespace(padded_vocab_size=38))
    with pytest.raises(UsageError, match="padded-vocab-size says 36"):
        check_architecture_flags(config, SimpleNamespace(padded_vocab_size=36))


def test_every_row_of_every_family_uses_known_dimensions_and_fields() -> None:
    config = ModelConfig.from_hf_dict(hf_config(), "here")
    for one in FAMILIES:
        for row in one.weights:
            assert set(row.shape) <= set(config.dimensions())
            assert all(isinstance(config.has(feature, 0), bool) for feature in row.when)


REQUIRED = (
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
CLASSES = {
    "qwen3": "Qwen3Config", "qwen2": "Qwen2Config", "llama": "LlamaConfig", "mistral": "MistralConfig",
    "gemma2": "Gemma2Config", "gemma3": "Gemma3TextConfig", "glm4": "Glm4Config", "phi3": "Phi3Config",
    "seed_oss": "SeedOssConfig", "internlm3": "InternLM3Config",
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_a_config_of_dimensions_alone_means_what_transformers_defaults_mean(name: str) -> None:
    import transformers

    defaults = getattr(transformers, CLASSES[name])(dtype="float32").to_dict()
    full = {**defaults, "architectures": list(family(name).architectures)}
    short = {key: full[key] for key in REQUIRED}
    assert ModelConfig.from_hf_dict(short, "short") == ModelConfig.from_hf_dict(full, "full")


RELEASED: dict[str, tuple[dict, dict]] = {
    "gemma3": (
        {
            "num_hidden_layers": 7, "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1e6,
            "rope_local_base_freq": 10000, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "query_pre_attn_scalar": 64,
        },
        {
            "layer_types": ("sliding_attention",) * 5 + ("full_attention", "sliding_attention"),
            "rotary_base_local": 10000, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "attention_scale": 0.125, "tie_word_embeddings": True,
        },
    ),
    "mistral": ({"sliding_window": None}, {"layer_types": (), "sliding_window": None}),
    "phi3": (
        {
            "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144,
            "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]},
        },
        {
            "rope_scaling": {
                "rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0],
                "original_max_position_embeddings": 4096,
            },
            "sliding_window": 262144,
        },
    ),
    "internlm2": (
        {"bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"add_qkv_bias": False, "add_proj_bias": False, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "internlm3": (
        {"bias": False, "qkv_bias": True}, {"add_qkv_bias": True, "add_proj_bias": False, "add_mlp_bias": False}
    ),
    "llama": (
        {
            "torch_dtype": "bfloat16",
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                "original_max_position_embeddings": 8192,
            },
        },
        {"dtype": "bfloat16"},
    ),
    "qwen2": ({"use_sliding_window": False, "sliding_window": 131072}, {"sliding_window": None, "layer_types": ()}),
    "gemma2": ({"attn_logit_softcapping": None, "num_hidden_layers": 3}, {
        "attention_softcap": None, "logit_softcap": 30.0,
        "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_keys_as_the_hubs_configs_spell_them_are_understood(name: str) -> None:
    changes, wanted = RELEASED[name]
    raw = {**hf_config(), "head_dim": None, "architectures": list(family(name).architectures)}
    raw.pop("tie_word_embeddings")
    config = ModelConfig.from_hf_dict({**raw, **changes}, "here")
    assert {field: getattr(config, field) for field in wanted} == wanted


def named(name: str, model_type: str, **flags: object) -> None:
    """Hold --model-type-hf against a model of the family `name`."""
    raw = {**hf_config(), "architectures": list(family(name).architectures)}
    if name == "mistral":
        raw["sliding_window"] = None
    check_architecture_flags(ModelConfig.from_hf_dict(raw, "here"), SimpleNamespace(model_type_hf=model_type, **flags))


def test_upstreams_names_of_families_are_accepted() -> None:
    for name, known in {
        "llama": "llama2", "mistral": "llama2", "internlm3": "llama2", "qwen2": "qwen25", "seed_oss": "seed-oss",
        "phi3": "phi3.5", "internlm2": "internlm2", "gemma2": "gemma2", "glm4": "glm4", "qwen3": "qwen3",
    }.items():  # fmt: skip
        named(name, known)
    named("qwen2", "llama2", add_qkv_bias=True)


def test_a_name_that_would_lose_the_biases_needs_the_flag_upstream_needs() -> None:
    with pytest.raises(UsageError, match="says llama2, the model is qwen2; add --add-qkv-bias"):
        named("qwen2", "llama2")
    with pytest.raises(UsageError, match="says mistral, the model is qwen2; leave it out"):
        named("qwen2", "mistral", add_qkv_bias=True)
    with pytest.raises(UsageError, match="says llama2, the model is qwen3"):
        named("qwen3", "llama2", add_qkv_bias=None)
