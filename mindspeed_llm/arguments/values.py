"""Text, or a value found in YAML, to the value of one flag."""

import math
from typing import Any

from mindspeed_llm.arguments.flags import Flag
from mindspeed_llm.errors import UsageError, unknown

BOOLEANS = {"true": True, "false": False}


def read_values(flag: Flag, values: list[Any], origin: str) -> Any:
    """The flag's value from the words (or YAML scalars) that followed it.

    Args:
        flag: what is being set.
        values: words of the command line, or scalars of YAML; empty after a bare `--flag`.
        origin: how the user named it ("--lr", "lr in job.yaml"), for the error.

    Raises:
        UsageError: wrong count, wrong type, or a value that is not among the choices.
    """
    if flag.is_list:
        _check_count(flag, len(values), origin)
        return [_read_one(flag, v, origin) for v in values]
    if flag.kind is bool and not values:
        return True
    if len(values) != 1:
        found = f"got {' '.join(map(str, values))!r}" if values else "got none"
        raise UsageError(f"{origin} takes one value ({flag.expects}), {found}")
    return _read_one(flag, values[0], origin)


def _check_count(flag: Flag, count: int, origin: str) -> None:
    if isinstance(flag.nargs, int) and count != flag.nargs:
        raise UsageError(f"{origin} takes exactly {flag.nargs} values, got {count}")
    if flag.nargs in (None, "+") and count == 0:
        raise UsageError(f"{origin} takes one value or more ({flag.expects}), got none")


def _read_one(flag: Flag, value: Any, origin: str) -> Any:
    result = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str}[flag.kind](value)
    if result is None:
        unit = f" ({flag.unit})" if flag.unit else ""
        raise UsageError(f"{origin} expects {flag.expects}{unit}, got {value!r}")
    if flag.choices is None or result in flag.choices:
        return result
    for choice in flag.choices:
        if str(choice).lower() == str(result).lower():
            return choice
    raise unknown(f"value of {origin}:", str(result), map(str, flag.choices))


def _read_bool(value: Any) -> bool | None:
    return value if isinstance(value, bool) else BOOLEANS.get(str(value).lower())


def _read_int(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return int(str(value))
    except ValueError:
        return None


def _read_float(value: Any) -> float | None:
    """A finite number: an infinite or undefined rate or probability is never meant."""
    if isinstance(value, bool):
        return None
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _read_str(value: Any) -> str | None:
    """Text; YAML turns `true` and `12` into other types, which are turned back as they were most likely written."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, (str, int, float)) else None
