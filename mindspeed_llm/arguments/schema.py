"""How an option is declared: a dataclass field with its own documentation.

Command line, `--help`, YAML, `args.json` and `docs/options.md` are all made from these fields; a flag is born here
and nowhere else. A field's type says how its text is read: `bool`, `int`, `float`, `str`, `X | None`, `list[X]`.
"""

from collections.abc import Sequence
from dataclasses import MISSING, field
from typing import Any


def option(
    default: Any = MISSING,
    *,
    help: str,
    choices: Sequence[Any] | None = None,
    unit: str = "",
    nargs: str | int | None = None,
) -> Any:
    """Declare one option (the value of a dataclass field).

    Args:
        default: value when the option is not given; left out, the option is required. `None` means "not given".
        help: one or two sentences: what it does, and where the default comes from when that is not obvious.
        choices: the only values accepted.
        unit: printed after the default ("tokens", "seconds", ...).
        nargs: for `list` fields: "+", "*" or a fixed count; "+" when left out.
    """
    metadata = {"help": help, "choices": tuple(choices) if choices else None, "unit": unit, "nargs": nargs}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata, kw_only=True)
    return field(default=default, metadata=metadata)
