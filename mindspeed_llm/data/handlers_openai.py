"""Rows with messages of role and content (OpenAI)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mindspeed_llm.data.handlers_common import (
    USUAL,
    BadRow,
    Reading,
    check_order,
    named_columns,
    placeholder,
    text_of,
    tools_of,
    trimmed,
)
from mindspeed_llm.data.messages import Call, Conversation, Message, Sample
from mindspeed_llm.errors import UsageError

ROLES = {"user": "user", "assistant": "assistant", "tool": "observation", "function": "observation"}


class OpenAIInstructionHandler:
    """Rows with `messages` and `tools`: role, content, reasoning_content (or thinking), tool_calls, tool_call_id.

    A first message of system or developer is the system text. Messages of the tool answer the call before them; the
    ids only have to name a call that was made. A message with `train: false` is not trained.
    """

    KIND = "chat"
    COLUMNS: Mapping[str, Any] = {"messages": "messages", "tools": "tools", "system": None}

    def __init__(self, map_keys: Mapping[str, Any], reading: Reading = USUAL) -> None:
        """Args: map_keys: key -> column. Raises UsageError for a key this format does not have."""
        self.reading = reading
        self.columns = named_columns(map_keys, self.COLUMNS, ("tags",))
        if not self.columns["messages"]:
            raise UsageError("--map-keys leaves no column for the messages")
        self.asked_for = [column for key, column in map_keys.items() if column and key in self.columns]

    def required_columns(self) -> list[str]:
        """The messages' column and those asked for."""
        return list(dict.fromkeys([self.columns["messages"], *self.asked_for]))

    def ignored_columns(self, present: Sequence[str]) -> list[str]:
        """system, when the data have it and `--map-keys` does not name it."""
        return ["system"] if self.columns["system"] is None and "system" in present else []

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """The row's conversation. Raises BadRow."""
        return [self.conversation(columns)]

    def conversation(self, columns: Mapping[str, Any]) -> Conversation:
        """The row's messages, those after the last answer left out. Raises BadRow."""
        name = self.columns["messages"]
        entries = columns.get(name)
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise BadRow(f"column {name!r} is not a list of messages")
        if not entries and not self.reading.upstream:
            raise BadRow(f"column {name!r} is an empty list")
        system = text_of(columns, self.columns["system"]) or None
        if entries and entries[0].get("role") in ("system", "developer"):
            system = _text(entries[0]) or system
            entries = entries[1:]
        tools = tools_of(columns, self.columns["tools"], not self.reading.upstream)
        if self.reading.upstream:
            return _as_upstream(entries, system, tools)
        messages = [_message(entry) for entry in entries]
        kept, unanswered = trimmed(messages)
        check_order(kept)
        _check_ids(entries)
        return Conversation(kept, system, tools, unanswered)


def _message(entry: Mapping[str, Any]) -> Message:
    role = entry.get("role")
    if role not in ROLES:
        raise BadRow(f"a message is by {str(role)[:40]!r}, known are {', '.join(ROLES)}")
    message = Message(role=ROLES[role], content=_text(entry))
    reasoning = entry.get("reasoning_content") or entry.get("thinking")
    if role == "assistant" and reasoning:
        if not isinstance(reasoning, str):
            raise BadRow("'reasoning_content' of a message is not text")
        message["thought"] = reasoning
    if role == "assistant" and entry.get("tool_calls"):
        message["calls"] = _calls(entry["tool_calls"])
    if entry.get("train") is not None:
        message["train"] = bool(entry["train"])
    return message


def _text(entry: Mapping[str, Any]) -> str:
    """A message's text; of a list of parts those of type text, one after the other."""
    content = entry.get("content")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if content is None and entry.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        raise BadRow("'content' of a message is not text")
    return content


def _calls(entries: Any) -> list[Call]:
    calls = []
    for entry in entries if isinstance(entries, list) else [None]:
        inner = entry.get("function", entry) if isinstance(entry, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise BadRow("'tool_calls' of a message is not a list of calls with names")
        arguments = inner.get("arguments")
        try:
            value = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            value = None
        if not isinstance(value, Mapping):
            raise BadRow("the arguments of a tool call are not a JSON object")
        calls.append(Call(name=inner["name"], arguments=value))
    return calls


def _check_ids(entries: Sequence[Mapping[str, Any]]) -> None:
    """Raise BadRow when a tool's answer names a call that was not made."""
    made: set[str] = set()
    for entry in entries:
        for call in entry.get("tool_calls") or ():
            if isinstance(call, Mapping) and isinstance(call.get("id"), str):
                made.add(call["id"])
        answered = entry.get("tool_call_id")
        if entry.get("role") == "tool" and isinstance(answered, str) and made and answered not in made:
            raise BadRow("a tool's answer names a call that was not made")


def _as_upstream(entries: Sequence[Mapping[str, Any]], system: str | None, tools: str | None) -> Conversation:
    """What upstream makes of the messages: their contents alone, and an empty pair where they are out of turn."""
    messages = [Message(role=ROLES.get(str(e.get("role")), "user"), content=e.get("content") or "") for e in entries]
    if not messages or messages[-1]["role"] != "assistant" or messages[0]["role"] != "user":
        raise BadRow("the messages do not begin with the user and end with the assistant")
    return placeholder(system, tools) if len(messages) % 2 else Conversation(messages, system, tools)
