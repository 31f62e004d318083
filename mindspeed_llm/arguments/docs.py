"""`docs/options.md` from the declarations: `python -m mindspeed_llm.arguments.docs`."""

from itertools import groupby
from pathlib import Path

from mindspeed_llm.arguments.aliases import ALIASES, ALIASES_BY_SCRIPT
from mindspeed_llm.arguments.flags import Flag, flags_of, spelling
from mindspeed_llm.arguments.help_text import default_text
from mindspeed_llm.arguments.programs import PROGRAMS
from mindspeed_llm.arguments.upstream import ACCEPTED, ACCEPTED_BY_SCRIPT, REFUSED, Accepted

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "options.md"

INTRODUCTION = """# Options

Made from the declarations in `mindspeed_llm/arguments` by `python -m mindspeed_llm.arguments.docs`; do not edit.

Names may be written with dashes or underscores, values as `--name value` or `--name=value`, booleans as `--flag` or
`--flag true|false`. `--config job.yaml` reads the same names from YAML, flat or in sections of any name; the command
line wins over the file, the file over environment variables. A flag given twice keeps its last value. Names are never
abbreviated; an unknown one is refused with the nearest known ones (exit status 2).
"""


def document() -> str:
    """The whole page: every script's options by subject, then the tables of aliases, accepted and refused flags."""
    parts = [INTRODUCTION]
    for script, program in PROGRAMS.items():
        parts.append(f"## {script}\n\n{(program.__doc__ or '').strip().splitlines()[0]}\n")
        for title, flags in groupby(flags_of(program), key=lambda flag: flag.title):
            parts.append(f"### {title}\n")
            parts.append(_table(("option", "value", "meaning"), [_row(flag) for flag in flags]))
    parts.append("## Other names\n")
    scopes = [("every script", ALIASES), *ALIASES_BY_SCRIPT.items()]
    names = [(_code(a), _code(t), scope) for scope, table in scopes for a, t in sorted(table.items())]
    parts.append(_table(("name", "stands for", "understood by"), names))
    parts.append(
        "## Accepted from upstream's scripts, needing nothing here\n\n"
        "Those given are listed once at the start of a run.\n"
    )
    parts.append(_table(("flag", "accepted by", "reason"), _accepted_rows()))
    parts.append("## Refused\n\nLeaving these out silently would change what a command means.\n")
    parts.append(_table(("flag", "reason"), [(_code(name), why) for name, why in sorted(REFUSED.items())]))
    return "\n".join(parts)


def _row(flag: Flag) -> tuple[str, str, str]:
    value = flag.expects
    if flag.is_list:
        value += f" (exactly {flag.nargs})" if isinstance(flag.nargs, int) else " ..."
    return f"`{flag.spelling}`", value.replace("|", r"\|"), f"{flag.help} *{default_text(flag)}*".replace("|", r"\|")


def _accepted_rows() -> list[tuple[str, str, str]]:
    scopes: list[tuple[str, dict[str, Accepted]]] = [("every script", ACCEPTED), *ACCEPTED_BY_SCRIPT.items()]
    rows = []
    for scope, table in scopes:
        for name, entry in sorted(table.items()):
            only = f"; only {' or '.join(entry.allowed)}" if entry.allowed else ""
            rows.append((_code(name), scope, entry.reason + only))
    return rows


def _code(name: str) -> str:
    return f"`{spelling(name)}`"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
