"""What a dataclass of options declares: its flags, flattened, with their types resolved."""

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any

SCALARS = (bool, int, float, str)


@dataclass(frozen=True)
class Flag:
    """One option, ready to be parsed, explained or written down.

    Attributes:
        name: canonical snake_case name, equal to the field's name.
        group: attribute of the program under which the field lies; "" for the program's own fields.
        title: heading for `--help`: the group's subject.
        kind: type of one value: bool, int, float or str.
        is_list: several values are read.
        optional: the type admits None, meaning "not given".
        required: there is no default.
        default: value when not given.
    """

    name: str
    group: str
    title: str
    kind: type
    is_list: bool
    optional: bool
    required: bool
    default: Any
    help: str
    choices: tuple[Any, ...] | None
    unit: str
    nargs: str | int | None
    env: str

    @property
    def spelling(self) -> str:
        """The flag as users write it, with dashes."""
        return spelling(self.name)

    @property
    def expects(self) -> str:
        """The kind of value in words, for error messages and help."""
        if self.choices:
            return "|".join(map(str, self.choices))
        return {bool: "true|false", int: "an integer", float: "a number", str: "text"}[self.kind]


def spelling(name: str) -> str:
    """`lora_r` -> `--lora-r`."""
    return "--" + name.replace("_", "-")


def subject(cls: type) -> str:
    """First sentence of a dataclass's docstring, without its full stop: the heading of a group."""
    return (cls.__doc__ or cls.__name__).strip().splitlines()[0].rstrip(".")


def flags_of(cls: type) -> list[Flag]:
    """Every flag of a program or group in declaration order, the program's own fields under the heading "This run".

    Raises TypeError when a field's type cannot be read from text or two groups declare one name: both are mistakes
    in the schema, not of the user.
    """
    found: dict[str, Flag] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "group" in field.metadata:
            inner = field.metadata["group"]
            inner_hints = typing.get_type_hints(inner)
            flags = [
                _flag(f, inner_hints[f.name], field.name, subject(inner))
                for f in dataclasses.fields(inner)
                if "help" in f.metadata
            ]
        elif "help" in field.metadata:
            flags = [_flag(field, hints[field.name], "", "This run")]
        else:
            flags = []
        for flag in flags:
            if flag.name in found:
                raise TypeError(f"{cls.__name__} declares {flag.name} twice")
            found[flag.name] = flag
    return list(found.values())


def _flag(field: dataclasses.Field, hint: Any, group: str, title: str) -> Flag:
    optional, hint = _strip_none(hint)
    is_list = typing.get_origin(hint) is list
    kind = typing.get_args(hint)[0] if is_list else hint
    if kind not in SCALARS:
        raise TypeError(f"option {field.name}: cannot read {hint} from text")
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = None if required else field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return Flag(field.name, group, title, kind, is_list, optional, required, default, **field.metadata)


def _strip_none(hint: Any) -> tuple[bool, Any]:
    """(does the type admit None, the type without it)."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return False, hint
    rest = [a for a in typing.get_args(hint) if a is not type(None)]
    if len(rest) != 1:
        raise TypeError(f"cannot read {hint} from text")
    return True, rest[0]
