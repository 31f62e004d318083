"""Rows to conversations: one class per data format, selected by `--handler-name`.

A handler never guesses: a row that is not what its format asks for comes back as `BadRow` with the reason, and the
caller counts and lists it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mindspeed_llm.data.encode import Conversation
from mindspeed_llm.data.templates import Message
from mindspeed_llm.errors import UsageError, unknown


class BadRow(Exception):
    """A row that cannot become a conversation; the text is the reason, the same for all rows of that kind."""


class Handler(Protocol):
    """Turns the columns of a row into a conversation."""

    def required_columns(self) -> list[str]:
        """Columns without which no row of a file can be used."""

    def ignored_columns(self, present: Sequence[str]) -> list[str]:
        """Columns of the data that mean something under this format but are not read."""

    def conversation(self, columns: Mapping[str, Any]) -> Conversation:
        """The conversation of one row. Raises BadRow."""


class AlpacaStyleInstructionHandler:
    """Rows with instruction, input and output, and on request history and system.

    The user's text is prompt and query, joined by a line break, empty parts left out. `history` is a list of
    [question, answer]; every answer is trained, those of the history too. `history` and `system` are read only
    when `--map-keys` names their columns.
    """

    DEFAULT_COLUMNS: Mapping[str, str | None] = {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": None,
        "system": None,
    }
    # keys of preference data: accepted in --map-keys, not read by this handler
    UNUSED_KEYS = ("chosen", "rejected")

    def __init__(self, map_keys: Mapping[str, Any]) -> None:
        """Args: map_keys: key -> column, as `--map-keys` gives it; an empty column name switches the key off.

        Raises:
            UsageError: a key this format does not have, or a column that is no text.
        """
        for key, column in map_keys.items():
            if key not in self.DEFAULT_COLUMNS and key not in self.UNUSED_KEYS:
                raise unknown("key in --map-keys:", key, self.DEFAULT_COLUMNS)
            if column is not None and not isinstance(column, str):
                raise UsageError(f"--map-keys: the column of {key!r} is {column!r}, a column name is expected")
        named = {key: map_keys.get(key, column) or None for key, column in self.DEFAULT_COLUMNS.items()}
        self.columns = named
        self.asked_for = [column for key, column in map_keys.items() if column and key in named]
        if not named["response"] or not (named["prompt"] or named["query"]):
            raise UsageError("--map-keys leaves no column for the response, or none for prompt and query")

    def required_columns(self) -> list[str]:
        """The answer's and the prompt's column (the query's where the prompt has none), and those asked for."""
        needed = [self.columns["response"], self.columns["prompt"] or self.columns["query"], *self.asked_for]
        return list(dict.fromkeys(column for column in needed if column))

    def ignored_columns(self, present: Sequence[str]) -> list[str]:
        """history and system, when the data have them and `--map-keys` does not name them."""
        return [key for key in ("history", "system") if self.columns[key] is None and key in present]

    def conversation(self, columns: Mapping[str, Any]) -> Conversation:
        """The row's history, question and answer. Raises BadRow."""
        parts = [_text(columns, self.columns["prompt"]), _text(columns, self.columns["query"])]
        question = "\n".join(part for part in parts if part)
        messages = _history(columns, self.columns["history"])
        messages += [Message(role="user", content=question), Message(role="assistant", content=self._answer(columns))]
        return Conversation(messages, _text(columns, self.columns["system"]) or None)

    def _answer(self, columns: Mapping[str, Any]) -> str:
        column = self.columns["response"]
        answer = columns.get(column or "")
        if isinstance(answer, list):
            if len(answer) != 1:
                raise BadRow(f"column {column!r} holds {'several answers' if answer else 'an empty list'}")
            answer = answer[0]
        if answer is None:
            raise BadRow(f"column {column!r} is missing or null")
        if not isinstance(answer, str):
            raise BadRow(f"column {column!r} is not text")
        return answer


def _text(columns: Mapping[str, Any], name: str | None) -> str:
    """Text of an optional column; empty when there is none."""
    value = columns.get(name) if name else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"column {name!r} is not text")
    return value


def _history(columns: Mapping[str, Any], name: str | None) -> list[Message]:
    """Messages of the earlier turns."""
    turns = (columns.get(name) if name else None) or []
    messages: list[Message] = []
    if not isinstance(turns, list):
        raise BadRow(f"column {name!r} is not a list of [question, answer]")
    for turn in turns:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(side, str) for side in turn)):
            raise BadRow(f"column {name!r} is not a list of [question, answer]")
        messages += [Message(role="user", content=turn[0]), Message(role="assistant", content=turn[1])]
    return messages


HANDLERS: Mapping[str, type[AlpacaStyleInstructionHandler]] = {
    "AlpacaStyleInstructionHandler": AlpacaStyleInstructionHandler,
}
# names users may bring from upstream whose formats are not read yet
NOT_YET = (
    "GeneralPretrainHandler", "AlpacaPretrainHandler", "SharegptPretrainHandler", "StackOverflowPythonPretrainHandler",
    "SharegptStyleInstructionHandler", "LlamaFactoryInstructionHandler", "HunyuanInstructionHandler",
    "AlpacaStylePairwiseHandler", "SharegptStylePairwiseHandler", "PPOAlpacaStyleInstructionHandler",
    "R1AlpacaStyleInstructionHandler", "R1SharegptStyleInstructionHandler", "GeneralInstructionHandler",
    "BelleMultiTurnInstructionHandler", "MOSSMultiTurnHandler", "MOSSInstructionHandler",
    "LeetcodePythonInstructionHandler", "AlpacaStyleProcessRewardHandler",
)  # fmt: skip


def get_handler(name: str, map_keys: Mapping[str, Any]) -> Handler:
    """The handler called `name`, reading the columns `map_keys` names.

    Raises:
        UsageError: no handler of that name, or keys it does not have.
    """
    if name in NOT_YET:
        raise UsageError(f"--handler-name {name} is not supported yet; supported: {', '.join(sorted(HANDLERS))}")
    if name not in HANDLERS:
        raise unknown("handler (--handler-name)", name, HANDLERS)
    return HANDLERS[name](map_keys)
