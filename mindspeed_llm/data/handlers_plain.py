"""Rows that their handler lays out itself, without a template."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mindspeed_llm.data.handlers_common import USUAL, BadRow, Reading, Unanswered, named_columns, needed_text, text_of
from mindspeed_llm.data.messages import PlainPiece, PlainTurns, Sample

INTRODUCTION = (
    "\nBelow is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. Please note that you need to think through your response "
    "logically and step by step.\n"
)
QUESTION, ANSWER = "### Instruction:\n", "### Response:\n"
# ids of Baichuan's vocabulary that open a user's and an assistant's turn
USER_TOKEN, ASSISTANT_TOKEN = 195, 196


def instruction_turns(exchanges: Sequence[tuple[str, str]]) -> PlainTurns:
    """The built-in Alpaca layout of (question, answer) pairs; the last answer is trained."""
    *earlier, (question, answer) = exchanges
    before = "".join(f"{QUESTION}{asked}\n{ANSWER}{answered}\n" for asked, answered in earlier)
    source = f"{INTRODUCTION}{before}{QUESTION}{question}\n{ANSWER}"
    return PlainTurns([((source,), (f"{answer}\n",))], whole=True)


class PlainHandler:
    """What the handlers of this file share: fixed columns, no template.

    Attributes:
        COLUMNS: the columns a row must have.
    """

    KIND = "chat"
    COLUMNS: tuple[str, ...] = ()

    def __init__(self, map_keys: Mapping[str, Any], reading: Reading = USUAL) -> None:
        """Args: map_keys: other names for the columns. Raises UsageError for a key that is no column."""
        self.reading = reading
        self.names = named_columns(map_keys, {column: column for column in self.COLUMNS})

    def required_columns(self) -> list[str]:
        """Every column the format has."""
        return [self.names[column] for column in self.COLUMNS if self.names[column]]

    def ignored_columns(self, present: Sequence[str]) -> list[str]:
        """None."""
        return []


class GeneralInstructionHandler(PlainHandler):
    """Rows with instruction, input and output in the built-in Alpaca layout."""

    COLUMNS = ("instruction", "input", "output")

    def required_columns(self) -> list[str]:
        """instruction and output."""
        return [self.names["instruction"], self.names["output"]]

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """The row's question and answer. Raises BadRow."""
        question = f"{text_of(columns, self.names['instruction'])}\n{text_of(columns, self.names['input'])}"
        return [instruction_turns([(question, needed_text(columns, self.names["output"]))])]


class BelleMultiTurnInstructionHandler(GeneralInstructionHandler):
    """Rows whose instruction holds earlier turns after "Human:" and "Assistant:"; the last answer is trained."""

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """The row's turns. Raises BadRow."""
        output = needed_text(columns, self.names["output"])
        parts = re.split(r"(Human|Assistant):", text_of(columns, self.names["instruction"]))
        said = list(zip(parts[1::2], (part.strip("\n ") for part in parts[2::2]), strict=True))
        if said and said[-1] == ("Assistant", ""):
            said.pop()
        if not said or [who for who, _ in said] != ["Human", "Assistant"] * (len(said) // 2) + ["Human"]:
            raise BadRow("the instruction does not alternate between Human: and Assistant: and end with Human:")
        texts = [text for _, text in said]
        earlier = list(zip(texts[0:-1:2], texts[1::2], strict=True))
        return [instruction_turns([*earlier, (texts[-1], output)])]


class LeetcodePythonInstructionHandler(PlainHandler):
    """Rows with code_with_problem, code_only and explanation_only: the problem is asked, code and text are answered."""

    COLUMNS = ("code_with_problem", "code_only", "explanation_only")

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """The row's problem and solution. Raises BadRow."""
        problem, code, explanation = (needed_text(columns, self.names[column]) for column in self.COLUMNS)
        return [instruction_turns([(problem.split("```", 1)[0].strip(), f"{code}\n{explanation}")])]


class MOSSMultiTurnHandler(PlainHandler):
    """Rows with `chat`, an object of turns with Human and MOSS, in Baichuan's turn tokens; every answer is trained."""

    COLUMNS = ("chat",)

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """The row's turns. Raises BadRow."""
        turns: list[tuple[Sequence[PlainPiece], Sequence[PlainPiece]]] = []
        for question, answer in self._exchanges(columns):
            turns.append(((USER_TOKEN, question, ASSISTANT_TOKEN), (answer,)))
        return [PlainTurns(turns, ends_with_eos=True, eos_opens_turns=self.reading.upstream)]

    def _exchanges(self, columns: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(question, answer) of each turn, without MOSS's tags."""
        chat = columns.get(self.names["chat"])
        if not isinstance(chat, Mapping):
            raise BadRow(f"column {self.names['chat']!r} is not an object of turns")
        exchanges = []
        for turn in chat.values():
            if not turn:
                continue
            said = [turn.get(who) for who in ("Human", "MOSS")] if isinstance(turn, Mapping) else []
            if not (len(said) == 2 and all(isinstance(text, str) for text in said)):
                raise BadRow("a turn of the chat is not text of Human and MOSS")
            exchanges.append((_untagged(said[0]), _untagged(said[1])))
        if not exchanges:
            raise Unanswered("no message is answered")
        return exchanges


class MOSSInstructionHandler(MOSSMultiTurnHandler):
    """The same rows in the built-in Alpaca layout: one sample per turn, with all that was said before it."""

    def samples(self, columns: Mapping[str, Any]) -> list[Sample]:
        """One sample per turn of the row. Raises BadRow."""
        exchanges = self._exchanges(columns)
        return [instruction_turns(exchanges[: n + 1]) for n in range(len(exchanges))]


def _untagged(text: str) -> str:
    """A MOSS utterance without its tags: `<|Human|>: hi<eoh>` -> `hi`."""
    return re.sub(r"<\|(?:Human|MOSS)\|>:|<eo[hm]>", "", text).strip()
