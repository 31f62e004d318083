"""Rows with the columns instruction, input and output (Alpaca)."""

from collections.abc import Mapping, Sequence
from typing import Any

from mindspeed_llm.data.handlers_common import (
    USUAL,
    BadRow,
    Reading,
    named_columns,
    placeholder,
    text_of,
)
from mindspeed_llm.data.messages import Conversation, Message, Preference, Sample
from mindspeed_llm.errors import UsageError


class AlpacaStyleInstructionHandler:
    """Rows with instruction, input and output, and on request history and system.

    The user's text is prompt and query, joined by a line break, empty parts left out. `history` is a list of
    [question, answer]; every answer is trained, those of the history too. `history` and `system` are read only
    when `--map-keys` names their columns.
    """

    KIND = "chat"
    COLUMNS: Mapping[str, str | None] = {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": None,
        "system": None,
    }
    # keys of preference data: accepted in --map-keys, not read by this handler
    UNUSED: tuple[str, ...] = ("chosen", "rejected")
    NEEDED: tuple[str, ...] = ("response",)

    def __init__(self, map_keys: Mapping[str, Any], reading: Reading = USUAL) -> None:
        """Args: map_keys: key -> column, as `--map-keys` gives it; an empty column name switches the key off.

        Raises:
            UsageError: a key this format does not have, or a column that is no text.
        """
        self.reading = reading
        self.columns = named_columns(map_keys, self.COLUMNS, self.UNUSED)
        self.asked_for = [column for key, column in map_keys.items() if column and key in self.columns]
        if not all(self.columns[key] for key in self.NEEDED) or not (self.columns["prompt"] or self.columns["query"]):
            raise UsageError(
                f"--map-keys leaves no column for the {' or '.join(self.NEEDED)}, or none for prompt and query"
            )

    def required_columns(self) -> list[str]:
        """The answer's and the prompt's column (the query's where the prompt has none), and those asked for."""
        needed = [*(self.columns[key] for key in self.NEEDED), self.columns["prompt"] or self.columns["query"]]
        return list(dict.fromkeys(column for column in [*needed, *self.asked_for] if column))

    def ignored_columns(self, present: Sequence[str]) -> list[str]:
        """history and system, when the data have them and `--map-keys` does not name them."""
        return [key for key in ("history", "system") if self.columns[key] is None and key in present]

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """The row's conversation. Raises BadRow."""
        return [self.conversation(columns)]

    def conversation(self, columns: Mapping[str, Any]) -> Conversation:
        """The row's history, question and answer. Raises BadRow."""
        system = text_of(columns, self.columns["system"]) or None
        answer = columns.get(self.columns["response"] or "")
        if self.reading.upstream and isinstance(answer, list) and len(answer) > 1:
            return placeholder(system)
        last = Message(role="assistant", content=self._one_text(columns, "response"))
        return Conversation([*self._questions(columns), last], system)

    def _questions(self, columns: Mapping[str, Any]) -> list[Message]:
        """History and question."""
        prompt = self.columns["prompt"]
        parts = [text_of(columns, prompt), text_of(columns, self.columns["query"])]
        missing = prompt and (prompt not in columns or (columns[prompt] is None and not parts[1]))
        if missing and not self.reading.upstream:
            raise BadRow(f"column {prompt!r} is missing or null")
        question = Message(role="user", content="\n".join(part for part in parts if part))
        return [*_history(columns, self.columns["history"]), question]

    def _one_text(self, columns: Mapping[str, Any], key: str) -> str:
        """Text of an answer's column, which may be a list of one."""
        column = self.columns[key]
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


class AlpacaStylePairwiseHandler(AlpacaStyleInstructionHandler):
    """Rows with instruction, input, and two answers: chosen and rejected, each a text or a list whose first counts."""

    KIND = "preference"
    COLUMNS: Mapping[str, str | None] = {
        **{key: column for key, column in AlpacaStyleInstructionHandler.COLUMNS.items() if key != "response"},
        "chosen": "chosen",
        "rejected": "rejected",
    }
    UNUSED = ("response",)
    NEEDED = ("chosen", "rejected")

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """The row's question and its two answers. Raises BadRow."""
        answers = [Message(role="assistant", content=self._first(columns, key)) for key in self.NEEDED]
        system = text_of(columns, self.columns["system"]) or None
        return [Preference(Conversation(self._questions(columns), system), *answers)]

    def _first(self, columns: Mapping[str, Any], key: str) -> str:
        """The answer, of a list the first one; upstream takes the second of the rejected ones."""
        column = self.columns[key] or ""
        answer = columns.get(column)
        if not isinstance(answer, list):
            return self._one_text(columns, key)
        place = 1 if self.reading.upstream and key == "rejected" else 0
        if len(answer) <= place or not isinstance(answer[place], str):
            raise BadRow(f"column {column!r} holds no text at the place of the answer")
        return answer[place]


class PPOAlpacaStyleInstructionHandler(AlpacaStyleInstructionHandler):
    """The prompts of Alpaca rows, for training that makes its own answers."""

    KIND = "prompt"


class R1AlpacaStyleInstructionHandler(AlpacaStyleInstructionHandler):
    """The prompts of Alpaca rows, and on request the answer and other columns as fields of their own."""

    KIND = "answer"


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
