"""Where the fields of a `ModelConfig` come from in HF's config.json: what the families share.

A family page starts from `llama_keys`, gives the defaults of its transformers class, and adds or replaces fields.
"""

from collections.abc import Mapping
from typing import Any

from mindspeed_llm.models.families.base import Derived, HfKey

NOT_EXPRESSED = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "rope_local_base_freq": None}
"""`Family.requires` of a plain Llama-like family: what transformers' Llama does not have either."""


def llama_keys(
    *, positions: int, epsilon: float = 1e-6, theta: float = 10000.0, tied: bool = False, **fields: HfKey | Derived
) -> dict[str, HfKey | Derived]:
    """The config mapping of a Llama-like family.

    Args:
        positions, epsilon, theta, tied: defaults of the family's transformers class for max_position_embeddings,
            rms_norm_eps, rope_theta and tie_word_embeddings.
        fields: `ModelConfig` fields to add or replace.
    """
    keys: dict[str, HfKey | Derived] = {
        "num_layers": HfKey("num_hidden_layers"),
        "hidden_size": HfKey("hidden_size"),
        "ffn_hidden_size": HfKey("intermediate_size"),
        "num_attention_heads": HfKey("num_attention_heads"),
        "num_query_groups": key_value_heads,
        "kv_channels": head_size,
        "vocab_size": HfKey("vocab_size"),
        "max_position_embeddings": HfKey("max_position_embeddings", positions),
        "rotary_base": HfKey("rope_theta", theta),
        "rope_scaling": HfKey("rope_scaling", None),
        "norm_epsilon": HfKey("rms_norm_eps", epsilon),
        "tie_word_embeddings": HfKey("tie_word_embeddings", tied),
        "dtype": HfKey("dtype", "float32"),
    }
    return {**keys, **fields}


def key_value_heads(flat: Mapping[str, Any]) -> int:
    """Key/value heads; as many as query heads where config.json does not say."""
    return flat.get("num_key_value_heads") or flat["num_attention_heads"]


def head_size(flat: Mapping[str, Any]) -> int:
    """Size of a head; hidden_size / heads where config.json does not say."""
    return flat.get("head_dim") or flat["hidden_size"] // flat["num_attention_heads"]


def nullable(key: str, default: Any) -> Derived:
    """A key whose null means none, while leaving it out means `default`."""
    return lambda flat: flat.get(key, default)


def window_of_every_layer(default: int | None) -> dict[str, Derived]:
    """`sliding_window` and `layer_types` of a family in which all layers slide, or none does (null).

    Args:
        default: the window where config.json does not mention it.
    """

    def layer_types(flat: Mapping[str, Any]) -> tuple[str, ...]:
        slides = flat.get("sliding_window", default) is not None
        return ("sliding_attention",) * flat["num_hidden_layers"] if slides else ()

    return {"sliding_window": nullable("sliding_window", default), "layer_types": layer_types}


def window_of_upper_layers(window: int, first: int) -> dict[str, Derived]:
    """`sliding_window` and `layer_types` of the Qwen families, whose upper layers slide when use_sliding_window is set.

    Args:
        window, first: defaults of the family's transformers class for sliding_window and max_window_layers.
    """

    def sliding_window(flat: Mapping[str, Any]) -> int | None:
        return flat.get("sliding_window", window) if flat.get("use_sliding_window") else None

    def layer_types(flat: Mapping[str, Any]) -> tuple[str, ...]:
        given = tuple(flat.get("layer_types") or ())
        if given or sliding_window(flat) is None:
            return given if "sliding_attention" in given else ()
        lower = min(flat.get("max_window_layers", first), flat["num_hidden_layers"])
        upper = flat["num_hidden_layers"] - lower
        return ("full_attention",) * lower + ("sliding_attention",) * upper if upper else ()

    return {"sliding_window": sliding_window, "layer_types": layer_types}


def window_by_pattern(window: int, pattern: int) -> dict[str, Derived]:
    """`sliding_window` and `layer_types` of the Gemma families: every `pattern`-th layer is full, the others slide.

    Args:
        window, pattern: defaults of the family's transformers class for sliding_window and sliding_window_pattern.
    """

    def layer_types(flat: Mapping[str, Any]) -> tuple[str, ...]:
        given = tuple(flat.get("layer_types") or ())
        period = flat.get("sliding_window_pattern") or pattern
        numbers = range(1, flat["num_hidden_layers"] + 1)
        return given or tuple("sliding_attention" if number % period else "full_attention" for number in numbers)

    return {"sliding_window": nullable("sliding_window", window), "layer_types": layer_types}
