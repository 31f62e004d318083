"""The dimensions of a model: read from HF's config.json or from a checkpoint, never typed into a recipe.

`ModelConfig` uses megatron-core's field names. `check_architecture_flags` holds upstream's architecture flags against
it: they are accepted where they agree and refused, with both values, where they contradict the model.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.models.families import family as family_named
from mindspeed_llm.models.families import family_of_architecture
from mindspeed_llm.models.families.base import REQUIRED, Family


@dataclass(frozen=True)
class ModelConfig:
    """Everything a weight table and the live model need to know about one model.

    Attributes:
        family: name of the family page (`mindspeed_llm.models.families`).
        num_query_groups: key/value heads.
        kv_channels: size of one attention head.
        vocab_size: rows of the embedding table in the HF model, before any padding for tensor parallelism.
        rotary_base: rope theta.
        dtype: of the stored weights, as torch spells it ("bfloat16").
        hf_config: HF's config.json as it was read; empty when the model came from a checkpoint without one.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    norm_epsilon: float
    tie_word_embeddings: bool
    qk_layernorm: bool
    add_qkv_bias: bool
    add_bias_linear: bool
    dtype: str
    hf_config: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse dimensions no model can have (`InputError`)."""
        for one in fields(self):
            value = getattr(self, one.name)
            if one.type is int and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"model config: {one.name} is {value!r}, expected a positive integer")
        if self.num_attention_heads % self.num_query_groups:
            raise InputError(
                f"model config: num_attention_heads {self.num_attention_heads} is not a multiple of"
                f" num_query_groups {self.num_query_groups}"
            )

    @classmethod
    def from_hf(cls, folder: str | Path) -> "ModelConfig":
        """Read `<folder>/config.json`; both older and newer transformers spellings are understood.

        Raises:
            InputError: the file is missing or broken, the family unknown, or the config asks for something the
                family page does not express.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file; a Hugging Face model folder holds a config.json")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid JSON ({error}); copy the model folder again") from error
        if not isinstance(raw, dict):
            raise InputError(f"{path}: holds a {type(raw).__name__}, expected an object")
        return cls.from_hf_dict(raw, str(path))

    @classmethod
    def from_hf_dict(cls, raw: Mapping[str, Any], where: str) -> "ModelConfig":
        """The same from a config.json already read; `where` names it in errors."""
        family = family_of_architecture(list(raw.get("architectures") or []), where)
        flat = flatten_hf_config(raw)
        check_required(family, flat, where)
        values: dict[str, Any] = dict(family.fixed)
        for name, (key, default) in family.config.items():
            value = flat.get(key)
            value = default if value is None else value
            if value is REQUIRED:
                raise InputError(f"{where}: has no {key!r}, which a {family.name} model needs")
            values[name] = value
        return cls(family=family.name, hf_config=dict(raw), **values)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "model config") -> "ModelConfig":
        """The config written by `to_dict`; `InputError` when fields are missing or unknown."""
        known = {one.name for one in fields(cls)}
        missing = sorted(known - set(values) - {"hf_config"})
        strange = sorted(set(values) - known)
        if missing or strange:
            raise InputError(
                f"{where}: missing fields {missing}, unknown fields {strange}; written by another version?"
            )
        family_named(values["family"])
        return cls(**values)

    def dimensions(self) -> dict[str, int]:
        """Sizes by the names weight tables use.

        vocab, hidden, ffn, head; query = heads x head; qkv = (heads + 2 x groups) x head; gated = 2 x ffn.
        """
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "head": self.kv_channels,
            "query": self.num_attention_heads * self.kv_channels,
            "qkv": (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels,
            "gated": 2 * self.ffn_hidden_size,
        }


def flatten_hf_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """HF config keys in one spelling: `dtype`, `rope_theta`, `rope_scaling`.

    Transformers 5 writes `dtype` for `torch_dtype` and one `rope_parameters` for `rope_theta` and `rope_scaling`; a
    `rope_scaling` of type "default" changes nothing and counts as none.
    """
    flat = dict(raw)
    flat["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    rope = dict(raw.get("rope_parameters") or {})
    if "rope_theta" in rope:
        flat["rope_theta"] = rope.pop("rope_theta")
    scaling = rope or raw.get("rope_scaling")
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    flat["rope_scaling"] = None if kind == "default" else scaling
    return flat


def check_required(family: Family, flat: Mapping[str, Any], where: str) -> None:
    """`InputError` when the config asks for a feature the family page cannot express: it must not vanish silently."""
    for key, only in family.requires.items():
        if flat.get(key, only) not in (only, None):
            raise InputError(f"{where}: {key} is {flat[key]!r}; for {family.name} only {only!r} is supported")


def architecture_values(config: ModelConfig) -> dict[str, Any]:
    """What each of upstream's architecture flags would have to say to describe this model."""
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "qk_layernorm": config.qk_layernorm,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "rotary_base": config.rotary_base,
        "norm_epsilon": config.norm_epsilon,
        "add_qkv_bias": config.add_qkv_bias,
        "add_bias_linear": config.add_bias_linear,
        "disable_bias_linear": not config.add_bias_linear,
        "true_vocab_size": config.vocab_size,
        "vocab_size": config.vocab_size,
        "swiglu": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
    }


def check_family(config: ModelConfig, options: Any, where: str) -> None:
    """`UsageError` when --model-type-hf or --spec name another family than the model's, or none at all.

    Args:
        options: any object; an attribute that is missing or None was not given.
        where: the model's folder.
    """
    named = getattr(options, "model_type_hf", None)
    if named and family_named(named).name != config.family:
        raise UsageError(f"--model-type-hf says {named}, {where} is {config.family}; leave it out")
    spec = getattr(options, "spec", None)
    if spec and spec[0].rpartition(".")[2] != f"{config.family}_spec":
        raise UsageError(f"--spec says {spec[0]}, {where} is {config.family}; leave it out")


def check_architecture_flags(config: ModelConfig, options: Any, where: str = "the model") -> None:
    """Hold the architecture flags that were given against the model; the flags themselves are never used.

    Args:
        config: the model's own dimensions.
        options: any object; an attribute that is missing or None was not given.
        where: where the dimensions come from (a path), for the error.

    Raises:
        UsageError: listing every flag that contradicts the model, with both values.
    """
    check_family(config, options, where)
    wrong = []
    for name, value in architecture_values(config).items():
        given = getattr(options, name, None)
        if given is not None and given != value:
            wrong.append(f"--{name.replace('_', '-')} says {given}, the model says {value}")
    padded = getattr(options, "padded_vocab_size", None)
    if padded is not None and padded < config.vocab_size:
        wrong.append(f"--padded-vocab-size says {padded}, the model has {config.vocab_size} rows")
    if wrong:
        raise UsageError(f"{'; '.join(wrong)} (read from {where}); leave these flags out, they are not needed")
