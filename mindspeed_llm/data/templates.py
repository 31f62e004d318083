"""Prompt templates by name, read from their file; how they lay out a conversation is in layout.py."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_llm.data.layout import CLASSES, CONTENT, DEFAULT_THOUGHT_WORDS, EOS, Format, Slot, Special, Template
from mindspeed_llm.data.messages import Message
from mindspeed_llm.data.tools import tool_format
from mindspeed_llm.errors import InputError, lookup, unknown

__all__ = ["TEMPLATES_FILE", "Message", "Template", "get_template", "template_names"]

TEMPLATES_FILE = Path(__file__).resolve().parents[2] / "configs" / "finetune" / "templates.json"


def get_template(name: str, path: str | Path | None = None) -> Template:
    """The template called `name` from a templates file (default: configs/finetune/templates.json).

    Raises:
        UsageError: no template of that name.
        InputError: the file cannot be read, or the entry is malformed.
    """
    file = Path(path).expanduser() if path else TEMPLATES_FILE
    entries = _read_entries(file)
    if name not in entries:
        raise unknown("template", name, entries)
    try:
        return _build(entries[name])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"template {name!r} in {file} is malformed: {error!r} (schema: docs/data.md)") from error


def template_names(path: str | Path | None = None) -> list[str]:
    """Names of the templates of a file, in its order. Raises InputError when it cannot be read."""
    return list(_read_entries(Path(path).expanduser() if path else TEMPLATES_FILE))


def _read_entries(file: Path) -> dict[str, dict[str, Any]]:
    """The entries of a templates file by name."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {entry["name"]: entry for entry in content}
    except OSError as error:
        raise InputError(
            f"cannot read the templates file {file} ({error.strerror}); check --prompt-type-path"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not a JSON list of templates, each with a name ({error!r})") from error


def _build(entry: Mapping[str, Any]) -> Template:
    """A template from its entry; formats left out take the defaults described in docs/data.md."""
    user = _format(entry, "format_user") or CONTENT
    efficient_eos = bool(entry.get("efficient_eos", False))
    ending = () if efficient_eos else (EOS,)
    default_system = entry.get("default_system") or ""
    opening, closing = entry.get("thought_words") or DEFAULT_THOUGHT_WORDS
    cls = lookup("template class", entry.get("template_class", "Template"), CLASSES)
    for key in ("format_user", "format_assistant", "format_system", "format_observation"):
        layout = _format(entry, key)
        if layout is not None and not layout.takes_content:
            raise ValueError(f"{key} has no {{{{content}}}}, so that the message's text would be lost")
    return cls(
        name=entry["name"],
        user=user,
        assistant=_format(entry, "format_assistant") or Format((*CONTENT.slots, *ending)),
        system=_format(entry, "format_system") or Format(CONTENT.slots),
        observation=_format(entry, "format_observation") or user,
        function=_format(entry, "format_function")
        or Format(("Action: {{name}}\nAction Input: {{arguments}}", *ending)),
        separator=_format(entry, "format_separator") or Format(),
        prefix=_format(entry, "format_prefix") or Format(),
        tools=tool_format(_tool_format_name(entry, "format_tools")),
        calls=tool_format(_tool_format_name(entry, "format_function")),
        default_system=default_system if isinstance(default_system, str) else "".join(default_system),
        stop_words=tuple(entry.get("stop_words") or ()),
        thought_words=(opening, closing),
        efficient_eos=efficient_eos,
        replace_eos=bool(entry.get("replace_eos", False)),
        force_system=bool(entry.get("force_system", False)),
        content_hash=hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest(),
    )


def _tool_format_name(entry: Mapping[str, Any], key: str) -> str:
    return (entry.get(key) or {}).get("tool_format") or "default"


def _format(entry: Mapping[str, Any], key: str) -> Format | None:
    """A format of the entry; None when it is left out."""
    slots = (entry.get(key) or {}).get("slots")
    if slots is not None and not isinstance(slots, list):
        raise ValueError(f"the slots of {key} are {slots!r}, no list")
    return Format(tuple(_slot(slot) for slot in slots)) if slots else None


def _slot(slot: Any) -> Slot:
    """A slot as written: text, {"token": text}, ["bos_token"] or ["eos_token"]."""
    if isinstance(slot, str):
        return slot
    if isinstance(slot, Mapping):
        return Special(slot["token"])
    if isinstance(slot, list) and len(slot) == 1 and slot[0] in ("bos_token", "eos_token"):
        return Special(slot[0])
    raise ValueError(f"slot {slot!r} is neither text, a token nor bos_token/eos_token")
