"""Command line, YAML job and environment to one dataclass of options.

Names may be written with dashes or underscores, values as `--name value` or `--name=value`, booleans as `--flag` or
`--flag true|false`. The command line wins over `--config job.yaml`, that over the environment, that over defaults;
a flag given twice keeps its last value; names are never abbreviated.
"""

import dataclasses
import json
import os
import sys
from typing import Any, TypeVar

from mindspeed_llm.arguments.aliases import aliases_for
from mindspeed_llm.arguments.flags import Flag, flags_of, spelling
from mindspeed_llm.arguments.help_text import help_text
from mindspeed_llm.arguments.job_file import read_job
from mindspeed_llm.arguments.schema import Parsed, Program
from mindspeed_llm.arguments.upstream import REFUSED, Accepted, accepted_for
from mindspeed_llm.arguments.values import BOOLEANS, read_values
from mindspeed_llm.errors import UsageError, nearest

P = TypeVar("P", bound=Program)


class CommandLineError(UsageError):
    """The options themselves are wrong: every rank of a launch finds the same, so one of them may speak for all."""


def parse(cls: type[P], argv: list[str], prog: str) -> P:
    """Read a program's options.

    `--help` prints and exits 0. Upstream flags that need nothing here are listed once on standard error, by rank 0.

    Args:
        cls: dataclass derived from `Program`.
        argv: the words after the script's name.
        prog: the script's name, for messages.

    Raises:
        CommandLineError: unknown, refused, malformed, missing or contradicting options.
    """
    try:
        options = _Reader(cls, prog).read(argv)
    except UsageError as error:
        raise CommandLineError(str(error)) from error
    if options.parsed.accepted and os.environ.get("RANK", "0") == "0":
        listed = " ".join(options.parsed.accepted)
        print(f"{prog}: accepted, needing nothing here (reasons: docs/options.md): {listed}", file=sys.stderr)
    return options


def given(options: Program) -> frozenset[str]:
    """Canonical names of the options set on the command line or in the YAML job."""
    return options.parsed.given


def accepted(options: Program) -> list[str]:
    """The upstream flags that were given and need nothing here, as canonical spellings."""
    return list(options.parsed.accepted)


def to_dict(options: Program) -> dict[str, Any]:
    """Every option's value, nested by group; fit for JSON, and readable again by `--config`."""
    values: dict[str, Any] = {}
    for flag in flags_of(type(options)):
        holder = getattr(options, flag.group) if flag.group else options
        section = values.setdefault(flag.group, {}) if flag.group else values
        section[flag.name] = getattr(holder, flag.name)
    return values


def to_json(options: Program) -> str:
    """`to_dict` as text, for `args.json`."""
    return json.dumps(to_dict(options), indent=2, ensure_ascii=False)


class _Reader:
    """One reading of one command line."""

    def __init__(self, cls: type, prog: str) -> None:
        self.cls = cls
        self.prog = prog
        self.flags: dict[str, Flag] = {flag.name: flag for flag in flags_of(cls)}
        self.tolerated: dict[str, Accepted] = accepted_for(cls.SCRIPT)
        self.aliases = aliases_for(cls.SCRIPT)
        self.values: dict[str, Any] = {}
        self.accepted: dict[str, None] = {}

    def read(self, argv: list[str]) -> Any:
        entries = split_words(argv, self._takes)
        if any(name in ("help", "h") for name, _, _ in entries):
            print(help_text(self.cls, self.prog))
            raise SystemExit(0)
        for name, values, origin in entries:
            if name == "config":
                if len(values) != 1:
                    raise UsageError(f"{origin} takes one value (a YAML file), got {len(values)}")
                for entry in read_job(values[0]):
                    self._set(*entry)
        for name, values, origin in entries:
            if name != "config":
                self._set(name, values, origin)
        explicit = frozenset(self.values)
        self._fill_from_environment()
        missing = [flag.spelling for flag in self.flags.values() if flag.required and flag.name not in self.values]
        if missing:
            raise UsageError(f"{', '.join(missing)} must be given ({self.prog} --help explains them)")
        return self._build(Parsed(explicit, tuple(self.accepted)))

    def _takes(self, name: str, next_word: str | None) -> bool:
        """Whether a word that is no flag itself, coming right after `name`, may belong to it."""
        flag = self.flags.get(self._canonical(name))
        if flag is not None and flag.kind is bool and not flag.is_list:
            return next_word is not None and next_word.lower() in BOOLEANS
        return True

    def _canonical(self, name: str) -> str:
        target = self.aliases.get(name, name)
        return target if name not in self.flags and target in self.flags else name

    def _set(self, name: str, values: list[Any], origin: str) -> None:
        name = self._canonical(name)
        if name in self.flags:
            self.values[name] = read_values(self.flags[name], values, origin)
        elif name in self.tolerated:
            self._accept(name, values, origin)
        elif name in REFUSED:
            if [str(v).lower() for v in values] != ["false"]:
                raise UsageError(f"{origin} is not accepted: {REFUSED[name]}")
        else:
            raise self._unknown(name, origin)

    def _accept(self, name: str, values: list[Any], origin: str) -> None:
        entry = self.tolerated[name]
        words = [str(v) for v in values]
        if entry.values == 0 and words and [w.lower() for w in words] not in (["true"], ["false"]):
            raise UsageError(f"{origin} takes no value, got {' '.join(words)!r}")
        if entry.values == 1 and len(words) != 1:
            raise UsageError(f"{origin} takes one value, got {len(words)}")
        wrong = [w for w in words if entry.allowed and w not in entry.allowed]
        if wrong:
            raise UsageError(f"{origin} {wrong[0]} is not supported ({entry.reason}); use {' or '.join(entry.allowed)}")
        self.accepted[spelling(name)] = None

    def _unknown(self, name: str, origin: str) -> UsageError:
        known = [*self.flags, *self.tolerated, "config", "help"]
        known += [alias for alias, target in self.aliases.items() if target in self.flags]
        close = [spelling(n) for n in nearest(name, known)]
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        return UsageError(f"unknown option {origin}{hint} ({self.prog} --help lists all)")

    def _fill_from_environment(self) -> None:
        for flag in self.flags.values():
            text = os.environ.get(flag.env, "") if flag.env else ""
            if text and flag.name not in self.values:
                words = text.split() if flag.is_list else [text]
                self.values[flag.name] = read_values(flag, words, f"environment variable {flag.env}")

    def _build(self, parsed: Parsed) -> Any:
        """The dataclass with its groups, each checked for contradictions (method `check`) once it is complete."""
        by_group: dict[str, dict[str, Any]] = {}
        for name, value in self.values.items():
            by_group.setdefault(self.flags[name].group, {})[name] = value
        own = dict(by_group.get("", {}))
        for field in dataclasses.fields(self.cls):
            if "group" in field.metadata:
                own[field.name] = _checked(field.metadata["group"](**by_group.get(field.name, {})))
        return _checked(self.cls(**own, parsed=parsed))


def _checked(options: Any) -> Any:
    check = getattr(options, "check", None)
    if check is not None:
        check()
    return options


def split_words(argv: list[str], takes: Any) -> list[tuple[str, list[str], str]]:
    """The command line as (name, values, spelling) in order.

    Args:
        argv: words; one that begins with `--` and a letter, and `-h`, names an option.
        takes: `takes(name, word)` says whether a word right after option `name` may be its value.

    Raises:
        UsageError: a word that belongs to no option.
    """
    entries: list[tuple[str, list[str], str]] = []
    open_ended = False
    for word in argv:
        if word == "-h" or (word.startswith("--") and word[2:3].isalpha()):
            head, equals, value = word.partition("=")
            name = head.lstrip("-").replace("-", "_")
            entries.append((name, [value] if equals else [], head))
            open_ended = not equals
        elif not entries:
            raise UsageError(f"unexpected word {word!r}: every value follows its option, as in --name value")
        elif not open_ended or (not entries[-1][1] and not takes(entries[-1][0], word)):
            raise UsageError(f"unexpected word {word!r} after {entries[-1][2]}")
        else:
            entries[-1][1].append(word)
    return entries
