"""`--help`: the options by subject, each with its meaning, default, unit and choices, and an example at the end."""

import shutil
import textwrap
from itertools import groupby

from mindspeed_llm.arguments.flags import Flag, flags_of
from mindspeed_llm.arguments.upstream import accepted_for


def help_text(cls: type, prog: str) -> str:
    """The whole help of a program, wrapped to the terminal (80 to 110 columns)."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 80), 110)
    lines = [f"usage: {prog} [--config job.yaml] --option value ...", ""]
    lines += _paragraphs(cls.__doc__ or "", width)
    lines += [
        "",
        "Dashes and underscores are alike; booleans are --flag or --flag true|false.",
        "--config FILE reads any of these options from YAML, flat or in sections; the command line wins.",
    ]
    for title, flags in groupby(flags_of(cls), key=lambda flag: flag.title):
        lines += ["", f"{title}:"]
        for flag in flags:
            lines += _entry(flag, width)
    tolerated = " ".join(sorted(accepted_for(cls.SCRIPT))).replace("_", "-")
    lines += ["", "Also accepted from upstream's scripts, needing nothing here (reasons in docs/options.md):"]
    lines += textwrap.wrap(tolerated, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    if cls.EXAMPLE:
        lines += ["", "example:", *("  " + line for line in cls.EXAMPLE.strip().splitlines())]
    return "\n".join(lines)


def value_hint(flag: Flag) -> str:
    """What follows the flag: `{a,b}`, `N`, `X`, `TEXT ...`; nothing for booleans."""
    if flag.kind is bool and not flag.is_list:
        return ""
    if flag.choices:
        hint = "{" + ",".join(map(str, flag.choices)) + "}"
    else:
        hint = {int: "N", float: "X", str: "TEXT", bool: "true|false"}[flag.kind]
    if not flag.is_list:
        return hint
    return " ".join([hint] * flag.nargs) if isinstance(flag.nargs, int) else f"{hint} ..."


def default_text(flag: Flag) -> str:
    """The default in words, with its unit and the environment variable that may replace it."""
    if flag.required:
        return "required"
    if flag.default is None or flag.default == []:
        text = "not given" if flag.kind is not bool else "not given (true|false)"
    elif isinstance(flag.default, bool):
        text = str(flag.default).lower()
    elif isinstance(flag.default, list):
        text = " ".join(map(str, flag.default))
    else:
        text = str(flag.default)
    unit = f" {flag.unit}" if flag.unit and flag.default is not None else (f"; in {flag.unit}" if flag.unit else "")
    env = f"; environment: {flag.env}" if flag.env else ""
    return f"default: {text}{unit}{env}"


def _entry(flag: Flag, width: int) -> list[str]:
    head = f"  {flag.spelling} {value_hint(flag)}".rstrip()
    body = textwrap.wrap(f"{flag.help} [{default_text(flag)}]", width - 8, break_on_hyphens=False)
    return [head, *("        " + line for line in body)]


def _paragraphs(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        lines += ["", *textwrap.wrap(" ".join(paragraph.split()), width)]
    return lines[1:]
