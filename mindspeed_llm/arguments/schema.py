"""How an option is declared: a dataclass field with its own documentation.

Command line, `--help`, YAML, `args.json` and `docs/options.md` are all made from these fields; a flag is born here
and nowhere else. A field's type says how its text is read: `bool`, `int`, `float`, `str`, `X | None`, `list[X]`.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar


def option(
    default: Any = MISSING,
    *,
    help: str,
    choices: Sequence[Any] | None = None,
    unit: str = "",
    nargs: str | int | None = None,
    env: str = "",
) -> Any:
    """Declare one option (the value of a dataclass field).

    Args:
        default: value when the option is not given; left out, the option is required. `None` means "not given".
        help: one or two sentences: what it does, and where the default comes from when that is not obvious.
        choices: the only values accepted (per element for lists).
        unit: printed after the default ("tokens", "seconds", ...).
        nargs: for `list` fields: "+", "*" or a fixed count; "+" when left out.
        env: environment variable that gives the value when neither command line nor YAML does.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices) if choices else None,
        "unit": unit,
        "nargs": nargs,
        "env": env,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata, kw_only=True)
    return field(default=default, metadata=metadata)


def group(cls: type) -> Any:
    """Declare a field that holds a whole group of options (a dataclass whose fields all have defaults)."""
    return field(default_factory=cls, metadata={"group": cls})


@dataclass(frozen=True)
class Parsed:
    """What the parser found, beyond the values themselves.

    Attributes:
        given: canonical names set on the command line or in the YAML job.
        accepted: upstream flags that were given and need nothing here, as written (`--use-flash-attn`).
    """

    given: frozenset[str] = frozenset()
    accepted: tuple[str, ...] = ()


@dataclass
class Program:
    """Base of every program's options: the script it belongs to, an example command, and what was parsed."""

    SCRIPT: ClassVar[str] = ""
    EXAMPLE: ClassVar[str] = ""

    parsed: Parsed = field(default_factory=Parsed, kw_only=True, repr=False, compare=False)
