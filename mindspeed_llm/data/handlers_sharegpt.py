"""Rows with a list of turns, each saying who speaks (ShareGPT)."""

from collections.abc import Mapping, Sequence
from typing import Any

from mindspeed_llm.data.handlers_common import (
    USUAL,
    BadRow,
    Reading,
    check_calls,
    check_order,
    named_columns,
    text_of,
    tools_of,
    trimmed,
)
from mindspeed_llm.data.messages import Conversation, Message, Preference, Sample
from mindspeed_llm.errors import UsageError, unknown

QUESTIONS, ANSWERS = ("user", "observation"), ("assistant", "function")


class SharegptStyleInstructionHandler:
    """Rows with `conversations`: turns of `from` (human, gpt, observation, function_call, system) and `value`.

    A first turn of the system is the system text, before the row's own column. `system` and `tools` are columns that
    are read only when `--map-keys` names them. A turn with `train: false` is not trained.
    """

    KIND = "chat"
    COLUMNS: Mapping[str, Any] = {"messages": "conversations", "system": None, "tools": None, "tags": None}
    UNUSED: tuple[str, ...] = ("chosen", "rejected", "kto_tag")
    TAGS: Mapping[str, str] = {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
        "system_tag": "system",
    }

    def __init__(self, map_keys: Mapping[str, Any], reading: Reading = USUAL) -> None:
        """Args: map_keys: key -> column; `tags` renames what turns are made of and who speaks.

        Raises:
            UsageError: a key or tag this format does not have, or a column that is no text.
        """
        self.reading = reading
        self.columns = named_columns(map_keys, self.COLUMNS, self.UNUSED)
        tags = self.columns.pop("tags") or {}
        if not isinstance(tags, Mapping) or not all(isinstance(value, str) for value in tags.values()):
            raise UsageError(f"--map-keys: tags must be an object of names, got {tags!r}")
        for tag in tags:
            if tag not in self.TAGS:
                raise unknown("tag in --map-keys:", tag, self.TAGS)
        # upstream forgets the system's tag when any other one is renamed
        usual = {**self.TAGS, "system_tag": ""} if tags and reading.upstream else self.TAGS
        self.tags = {**usual, **tags}
        self.roles = {
            self.tags[f"{name}_tag"]: role
            for name, role in (("user", "user"), ("assistant", "assistant"), ("observation", "observation"),
                               ("function", "function"))
        }  # fmt: skip
        if not self.columns["messages"]:
            raise UsageError("--map-keys leaves no column for the messages")
        self.asked_for = [column for key, column in map_keys.items() if column and key in self.columns]

    def required_columns(self) -> list[str]:
        """The turns' column and those asked for."""
        return list(dict.fromkeys([self.columns["messages"], *self.asked_for]))

    def ignored_columns(self, present: Sequence[str]) -> list[str]:
        """system and tools, when the data have them and `--map-keys` does not name them."""
        return [key for key in ("system", "tools") if self.columns[key] is None and key in present]

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """The row's conversation. Raises BadRow."""
        return [self.conversation(columns)]

    def conversation(self, columns: Mapping[str, Any]) -> Conversation:
        """The row's turns, those after the last answer left out. Raises BadRow."""
        messages, system, tools = self._read(columns)
        if self.reading.upstream:
            _check_as_upstream(messages, 0)
            return Conversation(messages, system, tools)
        kept, unanswered = trimmed(messages)
        check_order(kept)
        return Conversation(kept, system, tools, unanswered)

    def _read(self, columns: Mapping[str, Any]) -> tuple[list[Message], str | None, str | None]:
        """The row's messages, system text and tools."""
        name = self.columns["messages"]
        turns = columns.get(name)
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise BadRow(f"column {name!r} is not a list of turns")
        if not turns:
            raise BadRow(f"column {name!r} is an empty list")
        system = text_of(columns, self.columns["system"]) or None
        if self.tags["system_tag"] and turns[0].get(self.tags["role_tag"]) == self.tags["system_tag"]:
            system = self._content(turns[0]) or (None if self.reading.upstream else system)
            turns = turns[1:]
        tools = tools_of(columns, self.columns["tools"], not self.reading.upstream)
        return [self._message(turn) for turn in turns], system, tools

    def _message(self, turn: Mapping[str, Any]) -> Message:
        tag = turn.get(self.tags["role_tag"])
        if not isinstance(tag, str) or tag not in self.roles:
            raise BadRow(f"a turn is by {str(tag)[:40]!r}, known are {', '.join(self.roles)}")
        message = Message(role=self.roles[tag], content=self._content(turn))
        if message["role"] == "function" and not self.reading.upstream:
            check_calls(message["content"])
        if turn.get("train") is not None and not self.reading.upstream:
            message["train"] = bool(turn["train"])
        return message

    def _content(self, turn: Mapping[str, Any]) -> str:
        content = turn.get(self.tags["content_tag"])
        if not isinstance(content, str):
            raise BadRow(f"{self.tags['content_tag']!r} of a turn is not text")
        return content


class SharegptStylePairwiseHandler(SharegptStyleInstructionHandler):
    """Rows with turns that end with a question, and two answers: chosen and rejected, each a turn or a text."""

    KIND = "preference"
    COLUMNS: Mapping[str, Any] = {
        **SharegptStyleInstructionHandler.COLUMNS,
        "chosen": "chosen",
        "rejected": "rejected",
    }
    UNUSED = ("kto_tag",)

    def required_columns(self) -> list[str]:
        """The turns, both answers, and the columns asked for."""
        return list(dict.fromkeys([*super().required_columns(), self.columns["chosen"], self.columns["rejected"]]))

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """The row's question and its two answers. Raises BadRow."""
        messages, system, tools = self._read(columns)
        if self.reading.upstream:
            _check_as_upstream(messages, 1)
        elif not messages or messages[-1]["role"] not in QUESTIONS:
            raise BadRow("the turns before the two answers do not end with a question")
        else:
            check_order(messages)
        answers = [self._answer(columns, key) for key in ("chosen", "rejected")]
        return [Preference(Conversation(messages, system, tools), *answers)]

    def _answer(self, columns: Mapping[str, Any], key: str) -> Message:
        value = columns.get(self.columns[key] or "")
        if isinstance(value, str):
            return Message(role="assistant", content=value)
        if not isinstance(value, Mapping):
            raise BadRow(f"column {self.columns[key]!r} is neither a turn nor text")
        message = self._message(value)
        if message["role"] not in ANSWERS:
            raise BadRow(f"column {self.columns[key]!r} is no answer")
        return message


class R1SharegptStyleInstructionHandler(SharegptStyleInstructionHandler):
    """The prompts of ShareGPT rows, and on request the last answer and other columns as fields of their own."""

    KIND = "answer"


class HunyuanInstructionHandler(SharegptStyleInstructionHandler):
    """ShareGPT rows laid out by the tokenizer's own chat template; answers stand between its marks."""

    KIND = "chat"


def _check_as_upstream(messages: Sequence[Message], odd: int) -> None:
    """Raise BadRow for the rows that upstream drops: sides out of turn, or a number of messages that is not `odd`."""
    for position, message in enumerate(messages):
        if message["role"] not in (ANSWERS if position % 2 else QUESTIONS):
            raise BadRow("roles out of order")
    if len(messages) % 2 != odd or not messages:
        raise BadRow("the number of turns leaves one without its other side")
