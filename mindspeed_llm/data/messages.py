"""What handlers hand to the encoder: conversations, preferences, plain turns and texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict


class Call(TypedDict):
    """A call of a tool: its name, and its arguments as JSON text or as the values that JSON text stands for."""

    name: str
    arguments: Any


class _Required(TypedDict):
    role: str
    content: str


class Message(_Required, total=False):
    """One utterance.

    `role` is user, assistant, observation (a tool's answer) or function (a call of tools as the data spell it), and
    `content` its text. An assistant message may also bring `thought` (its reasoning, without tags), `calls`, and
    `train` (False: not trained).
    """

    thought: str
    calls: Sequence[Call]
    train: bool


@dataclass(frozen=True)
class Conversation:
    """Messages in the order in which they were said, and what stands before them.

    Attributes:
        messages: user or observation, and assistant or function, in turn; an even number when rows are made of it.
        system: system text; None or empty takes the template's default.
        tools: JSON text of the list of tools, None or empty for none.
        unanswered: how many messages at the end were left out because no answer follows them.
    """

    messages: Sequence[Message]
    system: str | None = None
    tools: str | None = None
    unanswered: int = 0


@dataclass(frozen=True)
class Preference:
    """A conversation that ends with a question, and two answers to it."""

    prompt: Conversation
    chosen: Message
    rejected: Message


SIDES = ("chosen", "rejected")  # the answers of a preference, as fields and files name them
PlainPiece = str | int  # text, or the id of one token


@dataclass(frozen=True)
class PlainTurns:
    """Turns laid out by their handler, without a template: (source, target) pieces, of which targets are trained.

    Attributes:
        whole: the text of all turns is tokenised as one, and a token is trained when it holds any character of a
            target (upstream: when it comes after as many tokens as the source has alone); else every piece is tokenised
            on its own.
        ends_with_eos: an end-of-text token follows the last turn, trained.
        eos_opens_turns: the label of the first token of every turn is end-of-text.
    """

    turns: Sequence[tuple[Sequence[PlainPiece], Sequence[PlainPiece]]]
    whole: bool = False
    ends_with_eos: bool = False
    eos_opens_turns: bool = False


@dataclass(frozen=True)
class Texts:
    """Texts by the name of the field each becomes."""

    fields: Mapping[str, str]


Sample = Conversation | Preference | PlainTurns | Texts
