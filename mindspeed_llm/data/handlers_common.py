"""What the handlers of all data formats share."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mindspeed_llm.data.messages import Conversation, Message, Sample
from mindspeed_llm.data.tools import parse_calls, parse_tools
from mindspeed_llm.errors import UsageError, unknown


class BadRow(Exception):
    """A row that cannot become a sample; the text is the reason, the same for all rows of that kind."""


class Unanswered(BadRow):
    """A row in which nothing is answered: left out, and no fault of the data."""


@dataclass(frozen=True)
class Reading:
    """How rows are to be read, besides the names of their columns.

    Attributes:
        upstream: rows that are no conversation are treated as upstream does.
        json_keys: columns of texts, for the handlers of texts.
        additional_keys: further columns that become fields of their own.
    """

    upstream: bool = False
    json_keys: tuple[str, ...] = ("text",)
    additional_keys: tuple[str, ...] = ()


USUAL = Reading()


class Handler(Protocol):
    """Turns the columns of a row into samples.

    Attributes:
        KIND: what its samples are: chat, preference, prompt (no answer), answer (prompts, and answers as a field),
            or text.
    """

    KIND: str

    def required_columns(self) -> list[str]:
        """Columns without which no row of a file can be used."""

    def ignored_columns(self, present: Sequence[str]) -> list[str]:
        """Columns of the data that mean something under this format but are not read."""

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """The samples of one row, at least one. Raises BadRow."""


EMPTY_PAIR = (Message(role="user", content=""), Message(role="assistant", content=""))


def text_of(columns: Mapping[str, Any], name: str | None) -> str:
    """Text of an optional column; empty when there is none. Raises BadRow when it is no text."""
    value = columns.get(name) if name else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"column {name!r} is not text")
    return value


def needed_text(columns: Mapping[str, Any], name: str) -> str:
    """Text of a column that must have one, which may be empty. Raises BadRow."""
    if columns.get(name) is None:
        raise BadRow(f"column {name!r} is missing or null")
    return text_of(columns, name)


def tools_of(columns: Mapping[str, Any], name: str | None, check: bool) -> str | None:
    """JSON text of the tools of a row. Raises BadRow when they are none and `check` asks for it."""
    value = columns.get(name) if name else None
    if not value:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if check:
        try:
            parse_tools(text)
        except ValueError:
            raise BadRow(f"column {name!r} is not a JSON list of tools with names") from None
    return text


def check_calls(content: str) -> None:
    """Raise BadRow when a text is no call of tools."""
    try:
        parse_calls(content)
    except ValueError:
        raise BadRow("a call of tools is not JSON with name and arguments") from None


def named_columns(map_keys: Mapping[str, Any], known: Mapping[str, Any], unused: Sequence[str] = ()) -> dict[str, Any]:
    """The column of every key: as `--map-keys` gives it, else as usual; an empty name switches a key off.

    Raises:
        UsageError: a key this format does not have, or a column that is no text.
    """
    for key, column in map_keys.items():
        if key not in known and key not in unused:
            raise unknown("key in --map-keys:", key, known)
        if key != "tags" and column is not None and not isinstance(column, str):
            raise UsageError(f"--map-keys: the column of {key!r} is {column!r}, a column name is expected")
    return {key: map_keys.get(key, column) or None for key, column in known.items()}


def trimmed(messages: list[Message]) -> tuple[list[Message], int]:
    """The messages up to the last answer, and how many follow it. Raises Unanswered when there is no answer."""
    answers = [n for n, message in enumerate(messages) if message["role"] in ("assistant", "function")]
    if not answers:
        raise Unanswered("no message is answered")
    end = answers[-1] + 1
    return messages[:end], len(messages) - end


def check_order(messages: Sequence[Message]) -> None:
    """Raise BadRow unless questions and answers alternate; several observations may follow one another."""
    previous = "nothing"
    for message in messages:
        role = message["role"]
        answers = role in ("assistant", "function")
        after_answer = previous in ("nothing", "assistant", "function")
        if answers == after_answer and not role == previous == "observation":
            raise BadRow(f"roles out of order: {role} after {previous}")
        previous = role


def placeholder(system: str | None = None, tools: str | None = None) -> Conversation:
    """The empty conversation that upstream writes for a row that is none."""
    return Conversation(EMPTY_PAIR, system, tools)
