"""Errors a user can act on, and the loud look-ups that raise them.

A `UsageError` means the command line is wrong (exit status 2); an `InputError` means a file, a checkpoint or the
machine is not what the command needs (exit status 1). Both carry one line: what is wrong, both sides, the remedy.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class UsageError(Exception):
    """The command line or the YAML job asks for something that does not exist or contradicts itself (exit 2)."""


class InputError(Exception):
    """A file, checkpoint, data set or port does not fit the command (exit 1)."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` of the `known` names closest to `name`, best first; may be empty."""
    folded = {k.lower(): k for k in known}
    return [folded[m] for m in difflib.get_close_matches(name.lower(), list(folded), n=count, cutoff=0.5)]


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not registered: it names the nearest ones and all that are known."""
    known = sorted(known)
    close = nearest(name, known)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return UsageError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")


def lookup(kind: str, name: str, table: Mapping[str, T]) -> T:
    """`table[name]`, or `unknown(kind, name, table)` raised."""
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]
