"""Alpaca rows as conversations, and the reasons for which a row is none."""

from typing import Any

import pytest

from mindspeed_llm.data.handlers import BadRow, get_handler
from mindspeed_llm.errors import UsageError

NAME = "AlpacaStyleInstructionHandler"
FULL = {"history": "history", "system": "system"}


def texts(map_keys: dict[str, Any], columns: dict[str, Any]) -> tuple[list[str], str | None]:
    found = get_handler(NAME, map_keys).conversation(columns)
    assert [m["role"] for m in found.messages] == ["user", "assistant"] * (len(found.messages) // 2)
    return [m["content"] for m in found.messages], found.system


def test_prompt_and_query_are_joined_and_empty_parts_left_out() -> None:
    assert texts({}, {"instruction": "a", "input": "b", "output": "c"}) == (["a\nb", "c"], None)
    assert texts({}, {"instruction": "", "input": "b", "output": "c"}) == (["b", "c"], None)
    assert texts({}, {"instruction": "a", "input": None, "output": "c"}) == (["a", "c"], None)
    assert texts({}, {"instruction": "a", "output": ["c"]}) == (["a", "c"], None)


def test_history_and_system_are_read_when_named_and_reported_when_not() -> None:
    row = {"instruction": "q", "output": "a", "history": [["h", "i"], ["j", "k"]], "system": "s"}
    assert texts(FULL, row) == (["h", "i", "j", "k", "q", "a"], "s")
    assert texts({}, row) == (["q", "a"], None)
    assert get_handler(NAME, {}).ignored_columns(list(row)) == ["history", "system"]
    assert get_handler(NAME, FULL).ignored_columns(list(row)) == []


def test_columns_can_be_renamed_and_switched_off() -> None:
    keys = {"prompt": "question", "query": "", "response": "answer"}
    assert texts(keys, {"question": "q", "input": "not this", "answer": "a"}) == (["q", "a"], None)
    assert get_handler(NAME, keys).required_columns() == ["answer", "question"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": None}, "'output' is missing or null"),
        ({"output": 5}, "'output' is not text"),
        ({"output": ["a", "b"]}, "several answers"),
        ({"output": []}, "empty list"),
        ({"instruction": 5}, "'instruction' is not text"),
        ({"input": {"a": 1}}, "'input' is not text"),
        ({"history": "text"}, r"not a list of \[question, answer\]"),
        ({"history": [["only one"]]}, r"not a list of \[question, answer\]"),
        ({"history": [["a", None]]}, r"not a list of \[question, answer\]"),
        ({"system": 1}, "'system' is not text"),
    ],
)
def test_a_row_that_is_no_conversation_says_why(change: dict[str, Any], reason: str) -> None:
    row = {"instruction": "q", "input": "", "output": "a", "history": [], "system": "", **change}
    with pytest.raises(BadRow, match=reason):
        get_handler(NAME, FULL).conversation(row)


def test_a_row_without_a_question_is_no_conversation_and_an_empty_question_is_one() -> None:
    handler = get_handler(NAME, {})
    for columns in ({"input": "x"}, {"instruction": None}, {"instruction": None, "input": ""}):
        with pytest.raises(BadRow, match="'instruction' is missing or null"):
            handler.conversation({"output": "a", **columns})
    for columns, text in (({"instruction": None, "input": "x"}, "x"), ({"instruction": ""}, "")):
        assert handler.conversation({"output": "a", **columns}).messages[0]["content"] == text


def test_unknown_handlers_and_keys_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=rf"did you mean '{NAME}'"):
        get_handler("AlpacaStyleInstructionHandlr", {})
    with pytest.raises(UsageError, match="did you mean 'SharegptStyleInstructionHandler'"):
        get_handler("SharegptStyleInstructionsHandler", {})
    with pytest.raises(UsageError, match="'promt'; did you mean 'prompt'"):
        get_handler(NAME, {"promt": "x"})
    with pytest.raises(UsageError, match="a column name is expected"):
        get_handler(NAME, {"prompt": 3})
    with pytest.raises(UsageError, match="no column for the response"):
        get_handler(NAME, {"response": ""})
