"""Config mappings of the families with experts, held against transformers' config classes."""

from typing import Any

import pytest

from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families import family
from tests.models.tiny_moe import DEEPSEEK_V3_YARN, YARN

SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "intermediate_size": 40,
    "vocab_size": 50,
}
EXPERT = {"moe_intermediate_size": 12}
NEEDED: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 16},
    "Qwen2Moe": {"num_experts": 16},
    "Mixtral": {},
    "Glm4Moe": {"n_routed_experts": 16, "head_dim": 6, **EXPERT},
    "DeepseekV2": {"n_routed_experts": 16, "num_experts_per_tok": 2, **EXPERT},
    "DeepseekV3": {"n_routed_experts": 16, **EXPERT},
    "GptOss": {"num_local_experts": 16},
}
"""What a config.json of the class has to say besides `SIZES`; all else has a default."""


def whole(name: str, **values: Any) -> dict[str, Any]:
    """The config.json that transformers writes for these values."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SIZES, **NEEDED[name], **values})
    return {**config.to_diff_dict(), **config.to_dict(), "architectures": [f"{name}ForCausalLM"]}


def read(raw: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_hf_dict(raw, "here")


@pytest.mark.parametrize("name", NEEDED)
def test_keys_left_out_have_the_defaults_of_transformers(name: str) -> None:
    given = {**SIZES, **NEEDED[name], "architectures": [f"{name}ForCausalLM"]}
    assert read({**given, "dtype": "float32"}) == read({**whole(name), "dtype": "float32"})


@pytest.mark.parametrize("scaling", [YARN, {**YARN, "mscale_all_dim": 0.0}])
def test_older_and_newer_rope_keys_give_one_config(scaling: dict[str, Any]) -> None:
    raw = whole("DeepseekV3", rope_parameters=dict(scaling))
    old = {key: value for key, value in raw.items() if key != "rope_parameters"}
    old["rope_theta"] = scaling["rope_theta"]
    old["rope_scaling"] = {"type": "yarn"} | {k: v for k, v in scaling.items() if k not in ("rope_type", "rope_theta")}
    new = read(raw)
    assert read(old) == new
    assert (new.attention_scale is None) == (scaling["mscale_all_dim"] == 0)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("DeepseekV3", "scoring_func", "softmax"),
        ("DeepseekV3", "attention_bias", True),
        ("DeepseekV2", "norm_topk_prob", True),
        ("DeepseekV2", "moe_layer_freq", 2),
        ("GptOss", "swiglu_limit", 5.0),
        ("Qwen3Moe", "hidden_act", "gelu"),
    ],
)
def test_what_a_family_cannot_express_is_refused_by_name(name: str, key: str, value: object) -> None:
    with pytest.raises(InputError, match=key):
        read({**whole(name), key: value})


@pytest.mark.parametrize(
    ("upstream", "own"),
    [
        ("qwen3-moe", "qwen3_moe"),
        ("qwen2-moe", "qwen2_moe"),
        ("mixtral", "mixtral"),
        ("glm45-moe", "glm4_moe"),
        ("deepseek2", "deepseek_v2"),
        ("deepseek2-lite", "deepseek_v2"),
        ("deepseek3", "deepseek_v3"),
    ],
)
def test_upstreams_names_are_accepted(upstream: str, own: str) -> None:
    assert family(upstream).name == own
    with pytest.raises(UsageError):
        family(upstream + "x")


def test_sizes_follow_from_the_latent_dimensions() -> None:
    config = read({**DEEPSEEK_V3_YARN.values, "architectures": ["DeepseekV3ForCausalLM"], "dtype": "float32"})
    sizes = config.dimensions()
    assert (config.kv_channels, config.num_query_groups) == (16, 4)
    assert {name: sizes[name] for name in ("query", "q_up", "kv_down", "kv_up", "q_lora")} == {
        "query": 4 * 12,
        "q_up": 4 * 16,
        "kv_down": 14 + 6,
        "kv_up": 4 * 22,
        "q_lora": 16,
    }
