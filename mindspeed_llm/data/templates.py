"""Prompt templates, as data: how a conversation is laid out as text and control tokens.

A template is an entry of `configs/finetune/templates.json`; its formats are lists of *slots*, and every slot of
every message is tokenised on its own, so no merge of the tokenizer crosses a slot. Entry schema: docs/data.md.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict

from mindspeed_llm.data.cutting import Pair, cut_turns, favour_shorter, proportional
from mindspeed_llm.errors import InputError, lookup, unknown

TEMPLATES_FILE = Path(__file__).resolve().parents[2] / "configs" / "finetune" / "templates.json"
DEFAULT_THOUGHT_WORDS = ("<think>\n", "\n</think>\n\n")
THINKING = ("true", "false", "none")
Thinking = Literal["true", "false", "none"]


class Message(TypedDict):
    """One utterance: `role` is user, assistant or observation (a tool's answer); `content` is its text."""

    role: str
    content: str


@dataclass(frozen=True)
class Special:
    """A slot that is one token of the table: a literal token, or "bos_token" / "eos_token" of the tokenizer."""

    name: str


Piece = str | Special
Pieces = list[Piece]
EOS = Special("eos_token")


@dataclass(frozen=True)
class Format:
    """Slots of one kind of message; `{{content}}` and `{{idx}}` (number of the turn, from 0) are filled in."""

    slots: tuple[Piece, ...] = ()

    def fill(self, content: str, idx: int) -> Pieces:
        """The slots with their placeholders replaced, each at most once per slot and in this order.

        A literal `{{idx}}` within the content is therefore replaced too when the slot itself has none: recorded
        upstream behaviour, which data made there shows.
        """
        return [
            slot.replace("{{content}}", content, 1).replace("{{idx}}", str(idx), 1) if isinstance(slot, str) else slot
            for slot in self.slots
        ]


@dataclass(frozen=True)
class Template:
    """A prompt template.

    Attributes:
        name: name under which it is asked for.
        user, assistant, system, observation, separator, prefix: formats of the parts of a conversation.
        default_system: system text of conversations that bring none.
        stop_words: tokens that end an answer at generation, besides the end-of-text token.
        thought_words: text before and after a thought (used by `ReasoningTemplate`).
        efficient_eos: an answer ends with eos as the label of the next turn's first token instead of a token of its
            own; after the last answer eos is a token.
        replace_eos: the first stop word takes the place of the tokenizer's end-of-text token.
        content_hash: sha256 over the entry, key order and layout of the file left aside.
    """

    name: str
    user: Format
    assistant: Format
    system: Format
    observation: Format
    separator: Format
    prefix: Format
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    thought_words: tuple[str, str] = DEFAULT_THOUGHT_WORDS
    efficient_eos: bool = False
    replace_eos: bool = False
    content_hash: str = ""

    uses_thinking: ClassVar[bool] = False

    def turns(self, messages: Sequence[Message], system: str | None, thinking: Thinking) -> list[tuple[Pieces, Pieces]]:
        """The conversation as (source, target) pieces of each turn; only targets are trained.

        Args:
            messages: user (or observation) and assistant messages in turn, an even number.
            system: system text; empty or None takes the template's default.
            thinking: ignored by templates without thoughts.
        """
        laid_out = self._lay_out(messages, system)
        return list(zip(laid_out[0::2], laid_out[1::2], strict=True))

    def prompt(self, messages: Sequence[Message], system: str | None, thinking: Thinking) -> Pieces:
        """The pieces a model continues to answer the last (user or observation) message."""
        return [piece for pieces in self._lay_out(messages, system) for piece in pieces]

    def cut(self, pairs: Sequence[Pair], seq_length: int, room: int) -> list[Pair]:
        """The tokenised turns cut to `seq_length` tokens, and to `room` where that is smaller."""
        return cut_turns(pairs, min(seq_length, room), proportional)

    def misses_thought(self, content: str) -> bool:
        """Whether an answer holds thought tags that the template does not take for a thought."""
        return False

    def _lay_out(self, messages: Sequence[Message], system: str | None) -> list[Pieces]:
        """The pieces of each message; system text and prefix belong to the first."""
        by_role = {"user": self.user, "assistant": self.assistant, "observation": self.observation}
        laid_out: list[Pieces] = []
        for position, message in enumerate(messages):
            pieces: Pieces = []
            if position == 0:
                pieces += self.prefix.fill("", 0)
                system_text = system or self.default_system
                if system_text:
                    pieces += self.system.fill(system_text, 0)
            elif position % 2 == 0:
                pieces += self.separator.fill("", 0)
            pieces += lookup("message role", message["role"], by_role).fill(message["content"], position // 2)
            laid_out.append(pieces)
        return laid_out


@dataclass(frozen=True)
class ReasoningTemplate(Template):
    """A template whose answers may open with a thought.

    Thinking "true" trains every answer with a thought (an empty one is put before answers without), "false" trains
    none (thoughts are removed, an empty one closes the prompt), "none" keeps thoughts that are there and closes
    the prompt of the other answers with an empty one. A thought counts only when written with the thought words to
    the letter, line breaks included.
    """

    uses_thinking: ClassVar[bool] = True

    @property
    def empty_thought(self) -> str:
        """The thought words with nothing between them."""
        return "".join(self.thought_words)

    @cached_property
    def _thought(self) -> re.Pattern[str]:
        opening, closing = map(re.escape, self.thought_words)
        return re.compile(f"{opening}(.*?){closing}", re.DOTALL)

    def turns(self, messages: Sequence[Message], system: str | None, thinking: Thinking) -> list[tuple[Pieces, Pieces]]:
        """As `Template.turns`, with the answers' thoughts as `thinking` asks."""
        if thinking == "false":
            messages = [self._without_thought(m) if m["role"] == "assistant" else m for m in messages]
        pairs = super().turns(messages, system, thinking)
        for (source, target), answer in zip(pairs, messages[1::2], strict=True):
            if self._has_thought(answer["content"]):
                continue
            if thinking == "true":
                target.insert(0, self.empty_thought)
            else:
                source.append(self.empty_thought)
        return pairs

    def prompt(self, messages: Sequence[Message], system: str | None, thinking: Thinking) -> Pieces:
        """As `Template.prompt`; earlier answers lose their thoughts, and unless thinking is "true" the model is
        told by an empty thought to answer at once."""
        history = [self._without_thought(m) if m["role"] == "assistant" else m for m in messages]
        pieces = super().prompt(history, system, thinking)
        return pieces if thinking == "true" else [*pieces, self.empty_thought]

    def cut(self, pairs: Sequence[Pair], seq_length: int, room: int) -> list[Pair]:
        """The tokenised turns cut to `seq_length` - 1 tokens, and to `room` where that is smaller."""
        return cut_turns(pairs, min(seq_length - 1, room), favour_shorter)

    def misses_thought(self, content: str) -> bool:
        """Whether an answer holds thought tags in another spelling than the thought words, e.g. on one line."""
        return not self._has_thought(content) and any(word.strip() in content for word in self.thought_words)

    def _has_thought(self, content: str) -> bool:
        return any(word in content for word in self.thought_words)

    def _without_thought(self, message: Message) -> Message:
        stripped = self._thought.sub("", message["content"]).lstrip("\n")
        return Message(role=message["role"], content=stripped)


CLASSES: Mapping[str, type[Template]] = {"Template": Template, "ReasoningTemplate": ReasoningTemplate}


def get_template(name: str, path: str | Path | None = None) -> Template:
    """The template called `name` from a templates file (default: configs/finetune/templates.json).

    Raises:
        UsageError: no template of that name.
        InputError: the file cannot be read, or the entry is malformed.
    """
    file = Path(path).expanduser() if path else TEMPLATES_FILE
    entries = _read_entries(file)
    if name not in entries:
        raise unknown("template", name, entries)
    try:
        return _build(entries[name])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"template {name!r} in {file} is malformed: {error!r} (schema: docs/data.md)") from error


def _read_entries(file: Path) -> dict[str, dict[str, Any]]:
    """The entries of a templates file by name."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {entry["name"]: entry for entry in content}
    except OSError as error:
        raise InputError(
            f"cannot read the templates file {file} ({error.strerror}); check --prompt-type-path"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not a JSON list of templates, each with a name ({error!r})") from error


def _build(entry: Mapping[str, Any]) -> Template:
    """A template from its entry; formats left out take the defaults described in docs/data.md."""
    user = _format(entry, "format_user") or Format(("{{content}}",))
    efficient_eos = bool(entry.get("efficient_eos", False))
    answer = Format(("{{content}}",) if efficient_eos else ("{{content}}", EOS))
    default_system = entry.get("default_system") or ""
    opening, closing = entry.get("thought_words") or DEFAULT_THOUGHT_WORDS
    cls = lookup("template class", entry.get("template_class", "Template"), CLASSES)
    return cls(
        name=entry["name"],
        user=user,
        assistant=_format(entry, "format_assistant") or answer,
        system=_format(entry, "format_system") or Format(("{{content}}",)),
        observation=_format(entry, "format_observation") or user,
        separator=_format(entry, "format_separator") or Format(),
        prefix=_format(entry, "format_prefix") or Format(),
        default_system=default_system if isinstance(default_system, str) else "".join(default_system),
        stop_words=tuple(entry.get("stop_words") or ()),
        thought_words=(opening, closing),
        efficient_eos=efficient_eos,
        replace_eos=bool(entry.get("replace_eos", False)),
        content_hash=hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest(),
    )


def _format(entry: Mapping[str, Any], key: str) -> Format | None:
    """A format of the entry; None when it is left out."""
    if not entry.get(key):
        return None
    return Format(tuple(_slot(slot) for slot in entry[key]["slots"]))


def _slot(slot: Any) -> Piece:
    """A slot as written: text, {"token": text}, ["bos_token"] or ["eos_token"]."""
    if isinstance(slot, str):
        return slot
    if isinstance(slot, Mapping):
        return Special(slot["token"])
    if isinstance(slot, list) and len(slot) == 1 and slot[0] in ("bos_token", "eos_token"):
        return Special(slot[0])
    raise ValueError(f"slot {slot!r} is neither text, a token nor bos_token/eos_token")
