"""Rows of running text."""

from collections.abc import Mapping, Sequence
from typing import Any

from mindspeed_llm.data.handlers_common import USUAL, BadRow, Reading, named_columns, needed_text, text_of
from mindspeed_llm.data.messages import Sample, Texts

ROW_TEXTS = ("conversations", "messages")


class GeneralPretrainHandler:
    """Texts as they are, one document per column of `--json-keys`."""

    KIND = "text"

    def __init__(self, map_keys: Mapping[str, Any], reading: Reading = USUAL) -> None:
        """Args: map_keys: none are known. Raises UsageError when there are any."""
        named_columns(map_keys, {})
        self.reading = reading

    def required_columns(self) -> list[str]:
        """The columns of `--json-keys`."""
        return list(self.reading.json_keys)

    def ignored_columns(self, present: Sequence[str]) -> list[str]:
        """None."""
        return []

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """The row's texts. Raises BadRow."""
        return [Texts({key: needed_text(columns, key) for key in self.reading.json_keys})]


class AlpacaPretrainHandler(GeneralPretrainHandler):
    """Alpaca rows as one text: a dialogue of a user and an assistant."""

    OPENING = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    REQUEST = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )

    def required_columns(self) -> list[str]:
        """instruction and output."""
        return ["instruction", "output"]

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """The row's text. Raises BadRow."""
        given = text_of(columns, "input")
        if given:
            middle = f"### Input:\n{given}\n\n"
        else:
            middle = "###None\n\n" if self.reading.upstream else ""
        text = (
            f"{self.OPENING}USER: {self.REQUEST}\n\n### Instruction:\n{text_of(columns, 'instruction')}\n\n{middle}"
            f"### Response: ASSISTANT: {needed_text(columns, 'output')}"
        )
        return [Texts({"text": text})]


class SharegptPretrainHandler(GeneralPretrainHandler):
    """The texts of a row's turns, one after the other."""

    def required_columns(self) -> list[str]:
        """The columns of `--json-keys` when they are named; else a row has `conversations` or `messages`."""
        return [] if self.reading.json_keys == ("text",) else list(self.reading.json_keys)

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """The row's texts. Raises BadRow."""
        texts = {}
        for key in self.reading.json_keys:
            usual = key if key in columns else next((name for name in ROW_TEXTS if name in columns), key)
            texts[key] = "".join(self._turns(columns.get(usual), usual))
        return [Texts(texts)]

    def _turns(self, turns: Any, name: str) -> list[str]:
        if not isinstance(turns, list) or not turns:
            raise BadRow(f"column {name!r} is not a list of turns")
        texts = [turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else turn for turn in turns]
        if not all(isinstance(text, str) for text in texts):
            raise BadRow("a turn has no text in value or content")
        return texts


class StackOverflowPythonPretrainHandler(GeneralPretrainHandler):
    """Rows with title, question_body and answer_body as one text."""

    COLUMNS = ("title", "question_body", "answer_body")

    def required_columns(self) -> list[str]:
        """Every column the format has."""
        return list(self.COLUMNS)

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """The row's text. Raises BadRow."""
        title, question, answer = (needed_text(columns, column) for column in self.COLUMNS)
        return [Texts({"text": f"In python, {title}\n### Question:\n{question}\n### Response:\n{answer}\n"})]
