"""HF's config.json in one spelling, and single fields of it: what older and newer transformers write differently."""

import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from mindspeed_llm.errors import InputError
from mindspeed_llm.models.families.base import REQUIRED, Derived, Family, HfKey


def hf_value(origin: HfKey | Derived, flat: Mapping[str, Any], what: str) -> Any:
    """One `ModelConfig` field from HF's config; `InputError` naming the key it lacks.

    Args:
        what: for the error, "<file>: a <family> model".
    """
    try:
        if not isinstance(origin, HfKey):
            return origin(flat)
        value = flat.get(origin.key)
        value = origin.default if value is None else value
        if value is REQUIRED:
            raise KeyError(origin.key)
        return value
    except KeyError as error:
        raise InputError(f"{what} needs {error} in its config.json, which lacks it") from error


def flatten_hf_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """HF config keys in one spelling.

    These are `dtype`, `rope_theta`, `rope_local_base_freq`, `partial_rotary_factor`, `rope_scaling` and
    `rope_scaling_local` (of sliding layers). Transformers 5 writes `dtype` for `torch_dtype` and one `rope_parameters`
    for all that concerns rotary positions, by layer type where layer types differ; a `rope_scaling` of type "default"
    changes nothing and counts as none. One that depends on the length before scaling carries it: the value beside it
    counts before its own, and max_position_embeddings where there is neither, as in transformers.
    """
    flat = dict(raw)
    flat["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    rope = dict(raw.get("rope_parameters") or {})
    if "full_attention" in rope or "sliding_attention" in rope:
        local = dict(rope.get("sliding_attention") or {})
        flat["rope_local_base_freq"] = local.get("rope_theta", raw.get("rope_local_base_freq"))
        flat["rope_scaling_local"] = None if local.get("rope_type", "default") == "default" else local
        rope = dict(rope.get("full_attention") or {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            flat[key] = rope.pop(key)
    scaling = dict(rope or raw.get("rope_scaling") or {})
    kind = scaling.pop("type", None)
    scaling.setdefault("rope_type", kind or "default")
    if scaling["rope_type"] in ("llama3", "yarn", "longrope"):
        own = scaling.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
        scaling["original_max_position_embeddings"] = raw.get("original_max_position_embeddings") or own
    flat["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    return flat


def check_required(family: Family, flat: Mapping[str, Any], where: str) -> None:
    """`InputError` when the config asks for a feature the family page cannot express: it must not vanish silently."""
    for key, only in family.requires.items():
        if flat.get(key, only) not in (only, None):
            raise InputError(f"{where}: {key} is {flat[key]!r}; for {family.name} only {only!r} is supported")


TYPES = {
    bool: "true or false", int: "a positive integer", float: "a finite number", str: "text",
    dict: "an object", tuple: "a list", NoneType: "null",
}  # fmt: skip


def wrong_type(kind: Any, value: Any) -> str | None:
    """What the value of a field should have been, None when it is that.

    Args:
        kind: the field's annotation: one of `TYPES`, a generic of one (`tuple[int, ...]`), or a union of such. An
            integer will do for a number.
    """
    choices = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    plain = [dict if get_origin(one) is Mapping else get_origin(one) or one for one in choices]
    if type(value) in plain or (type(value) is int and float in plain):
        finite = not isinstance(value, float) or math.isfinite(value)
        items = [get_args(one)[0] for one in choices if type(value) is tuple and get_origin(one) is tuple]
        if finite and all(type(item) is kinds for kinds in items for item in value):
            return None
    return " or ".join(TYPES[one] for one in plain if one is not NoneType)
