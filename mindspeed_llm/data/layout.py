"""Prompt templates, as data: how a conversation is laid out as text and control tokens.

A template is an entry of `configs/finetune/templates.json` (schema: docs/data.md). It divides a conversation into
turns of *blocks*; what becomes of blocks, slot by slot or as one text, is the encoders' matter.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import ClassVar, Literal, NamedTuple

from mindspeed_llm.data.cutting import Pair, cut_turns, favour_shorter, proportional
from mindspeed_llm.data.messages import Message
from mindspeed_llm.data.tools import ToolFormat, arguments_text, parse_calls, parse_tools, tool_format

DEFAULT_THOUGHT_WORDS = ("<think>\n", "\n</think>\n\n")
THINKING = ("true", "false", "none")
Thinking = Literal["true", "false", "none"]
# who wrote a text: the template, someone the model listens to, or the model
LITERAL, TEXT, ANSWER = "literal", "text", "answer"
Fragment = tuple[str, str]  # text, and who wrote it
PLACEHOLDER = re.compile(r"(\{\{(?:content|idx|name|arguments)\}\})")


class Special(NamedTuple):
    """A slot that is one token of the table: a literal token, or "bos_token" / "eos_token" of the tokenizer."""

    name: str


Slot = str | Special
EOS = Special("eos_token")
BOS = Special("bos_token")


class Format(NamedTuple):
    """Slots of one kind of message, with placeholders for its content, its turn's number, and a call's parts."""

    slots: tuple[Slot, ...] = ()

    @property
    def takes_content(self) -> bool:
        """Whether a message's text has a place in it."""
        return any(isinstance(slot, str) and "{{content}}" in slot for slot in self.slots)

    def followed_by(self, text: str) -> "Format":
        """The format with a text in place of the end-of-text token that closes it."""
        slots = self.slots[:-1] if self.slots[-1:] == (EOS,) else self.slots
        return Format((*slots, text))

    @property
    def repeated(self) -> str:
        """The text between the contents of two messages that share this format's opening and closing: of a tool's
        answer within tags the closing and opening tag, else a line break."""
        for slot in self.slots:
            tags = re.search(r"(<[^<>]+>)\n\{\{content\}\}\n(</[^<>]+>)", slot) if isinstance(slot, str) else None
            if tags:
                return f"\n{tags[2]}\n{tags[1]}\n"
        return "\n"


class Block(NamedTuple):
    """A format and what fills it.

    Attributes:
        content: for `{{content}}`, in fragments.
        idx: for `{{idx}}`, the number of the turn from 0; None where it is not filled in.
        name, arguments: for `{{name}}` and `{{arguments}}` of a call; of other blocks the name is None.
    """

    format: Format
    content: tuple[Fragment, ...] = ()
    idx: int | None = 0
    name: str | None = None
    arguments: str = ""


Blocks = list[Block]
Turn = tuple[Blocks, Blocks]  # what the model reads, what it writes
CONTENT = Format(("{{content}}",))


@dataclass(frozen=True)
class Template:
    """A prompt template.

    Attributes:
        name: name under which it is asked for.
        user, assistant, system, observation, function, separator, prefix: formats of the parts of a conversation.
        tools, calls: spelling of tools, and of calls.
        default_system: system text of conversations that bring none.
        stop_words: tokens that end an answer at generation, besides the end-of-text token.
        thought_words: text before and after a thought.
        efficient_eos: no end-of-text token stands between turns; after the last answer there is one.
        replace_eos: the first stop word takes the place of the tokenizer's end-of-text token.
        force_system: kept from the entry; no template class acts on it.
        content_hash: sha256 over the entry, key order and layout of the file left aside.
    """

    name: str
    user: Format
    assistant: Format
    system: Format
    observation: Format
    function: Format
    separator: Format
    prefix: Format
    tools: ToolFormat = field(default_factory=lambda: tool_format("default"))
    calls: ToolFormat = field(default_factory=lambda: tool_format("default"))
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    thought_words: tuple[str, str] = DEFAULT_THOUGHT_WORDS
    efficient_eos: bool = False
    replace_eos: bool = False
    force_system: bool = False
    content_hash: str = ""

    uses_thinking: ClassVar[bool] = False
    separates: ClassVar[bool] = True  # whether the separator is written between turns

    def turns(
        self, messages: Sequence[Message], system: str | None, thinking: Thinking, tools: str | None = None
    ) -> list[Turn]:
        """The conversation as turns; of a turn only the second side is trained.

        Args:
            messages: user (or observation) and assistant (or function) messages in turn; observations may follow one
                another.
            system: system text; empty or None takes the template's default.
            thinking: what becomes of thoughts; ignored by templates without.
            tools: JSON text of the tools.

        Raises:
            ValueError: tools or calls that are none.
        """
        laid_out = self.lay_out(messages, system, tools)
        return list(zip(laid_out[0::2], laid_out[1::2], strict=True))

    def final_turn(
        self, messages: Sequence[Message], system: str | None, thinking: Thinking, tools: str | None = None
    ) -> Turn:
        """All that precedes the last message, which is an answer, and that answer. Raises ValueError."""
        laid_out = self.lay_out(messages, system, tools)
        return list(chain.from_iterable(laid_out[:-1])), laid_out[-1]

    def prompt(
        self, messages: Sequence[Message], system: str | None, thinking: Thinking, tools: str | None = None
    ) -> Blocks:
        """The blocks a model continues to answer the last (user or observation) message. Raises ValueError."""
        return list(chain.from_iterable(self.lay_out(messages, system, tools)))

    def cut(self, pairs: Sequence[Pair], seq_length: int, room: int) -> list[Pair]:
        """The tokenised turns cut to `seq_length` tokens, and to `room` where that is smaller."""
        return cut_turns(pairs, min(seq_length, room), proportional)

    def misses_thought(self, content: str) -> bool:
        """Whether an answer holds thought tags that are not a whole thought."""
        return False

    def written(self) -> list[Slot]:
        """Every slot of every format, and the thought words of templates that write them."""
        formats = (self.user, self.assistant, self.system, self.observation, self.function, self.separator, self.prefix)
        slots = [slot for layout in formats for slot in layout.slots]
        return [*slots, *self.thought_words] if self.uses_thinking else slots

    def system_block(self, system: str, tools: str | None) -> Blocks:
        """The block of system text (the template's own where there is none) and tools; empty when there are neither."""
        fragments: list[Fragment] = [(system, TEXT)] if system else []
        if not system and self.default_system:
            fragments = [(self.default_system, LITERAL)]
        if not tools or not (parsed := parse_tools(tools)):
            return [Block(self.system, tuple(fragments))] if fragments else []
        spelled = tuple(
            (text, TEXT if from_data else LITERAL) for text, from_data in self.tools.tools_text(parsed, bool(fragments))
        )
        if self.tools.own_block:
            own = [Block(self.system, spelled)]
            return own + ([Block(self.system, tuple(fragments))] if fragments else [])
        return [Block(self.system, (*fragments, *spelled))]

    def answer(self, message: Message, idx: int) -> Blocks:
        """The blocks of an answer: its thought, its text and its calls."""
        content = message["content"]
        calls = message.get("calls") or ()
        if message["role"] == "function":
            calls, content = parse_calls(content), ""
        if message.get("thought"):
            opening, closing = self.thought_words
            content = f"{opening}{message['thought'].strip(chr(10))}{closing}{content.lstrip(chr(10))}"
        if not calls:
            return [Block(self.assistant, ((content, ANSWER),), idx)]
        if content and not content.endswith("\n"):
            content += "\n"
        if self.calls.wraps_calls:
            layout = self.function if self.function.takes_content else self.assistant
            return [Block(layout, ((content + self.calls.calls_text(calls), ANSWER),), idx)]
        before = [Block(CONTENT, ((content, ANSWER),), idx)] if content else []
        layouts = [*[self.function.followed_by("\n")] * (len(calls) - 1), self.function]
        spelled = zip(layouts, calls, strict=True)
        return before + [Block(layout, (), idx, call["name"], arguments_text(call)) for layout, call in spelled]

    def lay_out(self, messages: Sequence[Message], system: str | None, tools: str | None) -> list[Blocks]:
        """The blocks of each message (of each run of observations); what stands before all belongs to the first."""
        laid_out: list[Blocks] = []
        previous = ""
        for message in messages:
            role = message["role"]
            position = len(laid_out)
            if role == previous == "observation":
                last = laid_out[-1].pop()
                more = (*last.content, (self.observation.repeated, LITERAL), (message["content"], TEXT))
                laid_out[-1].append(last._replace(content=more))
                continue
            previous = role
            blocks: Blocks = []
            if position == 0:
                if self.prefix.slots:
                    blocks.append(Block(self.prefix))
                blocks += self.system_block(system or "", tools)
            elif position % 2 == 0 and self.separates:
                blocks.append(Block(self.separator))
            if role in ("assistant", "function"):
                blocks += self.answer(message, position // 2)
            else:
                layout = self.observation if role == "observation" else self.user
                blocks.append(Block(layout, ((message["content"], TEXT),), position // 2))
            laid_out.append(blocks)
        return laid_out


@dataclass(frozen=True)
class LFDefaultTemplate(Template):
    """A template whose formats close a turn themselves: the separator is not written."""

    separates: ClassVar[bool] = False

    def cut(self, pairs: Sequence[Pair], seq_length: int, room: int) -> list[Pair]:
        """The tokenised turns cut to `seq_length` - 1 tokens, and to `room` where that is smaller."""
        return cut_turns(pairs, min(seq_length - 1, room), favour_shorter)


@dataclass(frozen=True)
class Llama2Template(Template):
    """A template whose system text stands within the first user message."""

    def lay_out(self, messages: Sequence[Message], system: str | None, tools: str | None) -> list[Blocks]:
        """As `Template.lay_out`; the filled system format is the beginning of the first message's content."""
        laid_out = super().lay_out(messages, system, tools)
        blocks = laid_out[0]
        inlined = [block for block in blocks if block.format is self.system]
        if inlined:
            first = blocks[-1]
            before = tuple(chain.from_iterable(_inline(block) for block in inlined))
            rest = [block for block in blocks[:-1] if block.format is not self.system]
            laid_out[0] = [*rest, first._replace(content=before + first.content)]
        return laid_out


@dataclass(frozen=True)
class ReasoningTemplate(Template):
    """A template whose answers may open with a thought.

    Thinking "true" trains every answer with a thought (an empty one is put before answers without), "false" trains
    none (thoughts are removed, an empty one closes the prompt), "none" keeps thoughts that are there and closes
    the prompt of the other answers with an empty one. An answer with thought tags, however they are spaced, has a
    thought.
    """

    uses_thinking: ClassVar[bool] = True

    @property
    def empty_thought(self) -> str:
        """The thought words with nothing between them."""
        return "".join(self.thought_words)

    @cached_property
    def _empty(self) -> Block:
        return Block(Format((self.empty_thought,)))

    @cached_property
    def tags(self) -> tuple[str, str]:
        """The thought words without the white space around them."""
        opening, closing = self.thought_words
        return opening.strip(), closing.strip()

    @cached_property
    def _thought(self) -> re.Pattern[str]:
        opening, closing = map(re.escape, self.tags)
        return re.compile(rf"{opening}(.*?){closing}\s*", re.DOTALL)

    def turns(
        self, messages: Sequence[Message], system: str | None, thinking: Thinking, tools: str | None = None
    ) -> list[Turn]:
        """As `Template.turns`, with the answers' thoughts as `thinking` asks."""
        if thinking == "false":
            messages = [self.without_thought(message) for message in messages]
        turns = super().turns(messages, system, thinking, tools)
        answers = [message for message in messages if message["role"] in ("assistant", "function")]
        for (source, target), answer in zip(turns, answers, strict=True):
            if self.has_thought(answer):
                continue
            if thinking == "true":
                target.insert(0, self._empty)
            else:
                source.append(self._empty)
        return turns

    def final_turn(
        self, messages: Sequence[Message], system: str | None, thinking: Thinking, tools: str | None = None
    ) -> Turn:
        """As `Template.final_turn`; what precedes is as in a prompt, the last answer's thought as `thinking` asks."""
        last = self.without_thought(messages[-1]) if thinking == "false" else messages[-1]
        source, target = super().final_turn([*self.as_history(messages[:-1], thinking), last], system, thinking, tools)
        if self.has_thought(last):
            return source, target
        block = self._empty
        return (source, [block, *target]) if thinking == "true" else ([*source, block], target)

    def prompt(
        self, messages: Sequence[Message], system: str | None, thinking: Thinking, tools: str | None = None
    ) -> Blocks:
        """As `Template.prompt`; unless thinking is "true" the model is told by an empty thought to answer at once."""
        blocks = super().prompt(self.as_history(messages, thinking), system, thinking, tools)
        return blocks if thinking == "true" else [*blocks, self._empty]

    def as_history(self, messages: Sequence[Message], thinking: Thinking) -> list[Message]:
        """The messages before an answer: without their thoughts, but for those with which the model has called tools
        since the last question (unless thinking is "false"); so the models' own chat templates do it."""
        last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
        return [
            message if n > last and thinking != "false" and self.has_thought(message) else self._past(message)
            for n, message in enumerate(messages)
        ]

    def _past(self, message: Message) -> Message:
        """A message without its thought; an answer opens as it does after a thought."""
        kept = self.without_thought(message)
        opening = self._opening
        if message["role"] == "assistant" and opening and not message.get("calls"):
            kept = {**kept, "content": opening + kept["content"]}
        return kept

    @cached_property
    def _opening(self) -> str:
        """What follows the end of a thought where that begins a message of its own (gpt-oss), else nothing."""
        written = self.user.slots[-1]
        asked = written.rpartition("{{content}}")[2] if isinstance(written, str) else ""
        closing = self.thought_words[1]
        return closing.removeprefix(asked) if asked and closing.startswith(asked) else ""

    def cut(self, pairs: Sequence[Pair], seq_length: int, room: int) -> list[Pair]:
        """The tokenised turns cut to `seq_length` - 1 tokens, and to `room` where that is smaller."""
        return cut_turns(pairs, min(seq_length - 1, room), favour_shorter)

    def misses_thought(self, content: str) -> bool:
        """Whether an answer holds only one of the two thought tags."""
        opening, closing = self.tags
        return (opening in content) != (closing in content)

    def has_thought(self, message: Message) -> bool:
        """Whether an answer brings a thought, or at least one of its tags."""
        if message.get("thought"):
            return True
        content, (opening, closing) = message["content"], self.tags
        return message["role"] == "assistant" and (opening in content or closing in content)

    def without_thought(self, message: Message) -> Message:
        """The message, an answer's thoughts and the line breaks before its text removed."""
        if message["role"] != "assistant":
            return message
        kept = message.copy()
        kept.pop("thought", None)
        kept["content"] = self._thought.sub("", message["content"]).lstrip("\n")
        return kept


def _inline(block: Block) -> list[Fragment]:
    """A block's text as fragments of another block's content; its slots hold no single tokens."""
    fragments: list[Fragment] = []
    for part in chain.from_iterable(PLACEHOLDER.split(slot) for slot in block.format.slots if isinstance(slot, str)):
        fragments += list(block.content) if part == "{{content}}" else [(part, LITERAL)]
    return fragments


CLASSES: Mapping[str, type[Template]] = {
    "Template": Template,
    "Llama2Template": Llama2Template,
    "LFDefaultTemplate": LFDefaultTemplate,
    "ReasoningTemplate": ReasoningTemplate,
}
