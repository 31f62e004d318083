"""The tokenizer's own chat template as a prompt template (`--prompt-type hf`).

What is trained: the parts that the template marks with `{% generation %}`; where it marks none, of each answer what its
turn adds to the text of all before it, and the token that ends it. A template that closes no turn (GLM-4.5) ends an
answer with the token that opens what follows; after the last answer the one that would follow is added. A template that
writes earlier turns otherwise than later ones (Qwen3 leaves old thoughts out) has only its last answer trained, and the
row says so.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from mindspeed_llm.data.control_tokens import MARK
from mindspeed_llm.data.cutting import Pair
from mindspeed_llm.data.encode import ChatEncoder, Encoded, Limits, parse_thinking
from mindspeed_llm.data.jinja_chat import CLOSING, OPENING, ChatTemplateError, JinjaChat
from mindspeed_llm.data.layout import Format, LFDefaultTemplate, Thinking
from mindspeed_llm.data.messages import Call, Conversation, Message, PlainTurns, Preference
from mindspeed_llm.data.tokenizer import Tokenizer
from mindspeed_llm.data.tools import arguments_text, arguments_value, parse_calls, parse_tools, wrapped
from mindspeed_llm.data.whole_text import Laid, WholeTextEncoder, laid_out
from mindspeed_llm.errors import InputError, UsageError

BREAK = "\ufdd1"  # a noncharacter put into control tokens that are to stay text, until they are marked
ONLY_LAST = "only the last answer is trained: the chat template writes earlier turns otherwise once others follow"
THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
ANSWERS = ("assistant", "function")
ROLES = {"user": "user", "assistant": "assistant", "function": "assistant", "observation": "tool"}
EXAMPLE = (Message(role="user", content="a"), Message(role="assistant", content="b"))
Span = tuple[int, int]


@dataclass(frozen=True)
class ChatTemplate(LFDefaultTemplate):
    """The chat template as the report and the recorded data know it; its formats are empty."""


@dataclass(frozen=True)
class ThinkingChatTemplate(ChatTemplate):
    """A chat template that can be told to think or not to."""

    uses_thinking: ClassVar[bool] = True


class HfEncoder(ChatEncoder):
    """The chat template of a tokenizer, bound to that tokenizer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        enable_thinking: str = "none",
        allow_control_tokens: bool = False,
        answer_marks: tuple[str, str] | None = None,
    ) -> None:
        """Args:
            enable_thinking: true and false are told to the template, and false removes thoughts; none is not told.
            allow_control_tokens: text of users, systems and tools that spells a control token becomes that token.
            answer_marks: tokens that open and close an answer in the text; else the template says, or the turns.

        Raises:
            InputError: the tokenizer has no chat template, or it cannot be read.
        """
        source = tokenizer.chat_template
        if not source:
            raise InputError(f"the tokenizer in {tokenizer.path} has no chat template; choose one with --prompt-type")
        names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
        self.chat = JinjaChat(source, {name: token for name, token in names.items() if token is not None})
        kind = ThinkingChatTemplate if self.chat.knows_thinking else ChatTemplate
        none = Format()
        digest = hashlib.sha256(source.encode()).hexdigest()
        template = kind("hf", none, none, none, none, none, none, none, content_hash=digest)
        super().__init__(template, tokenizer, enable_thinking, None, allow_control_tokens)
        assert isinstance(self._way, WholeTextEncoder)
        self.marked, self.spelling = self._way.marked, self._way.spelling
        self._tags = self._way.answer_tags
        self.answer_marks = answer_marks
        self._quote = _checked(str if allow_control_tokens else self.spelling.breaker(BREAK))
        self._quote_answer = _checked(str if allow_control_tokens else self.spelling.breaker(BREAK, self._tags))

    def encode_multiturn(
        self, messages: Sequence[Message], system: str | None = None, cutoff: int | None = None
    ) -> list[Pair]:
        """(what precedes, ids) of each trained part."""
        row = self.encode_rows([Conversation(messages, system)], Limits(cutoff))[0]
        pairs, at = [], 0
        for start, stop in row.spans:
            pairs.append(([int(i) for i in row.ids[at:start]], [int(i) for i in row.ids[start:stop]]))
            at = stop
        return pairs

    def encode_prompt(
        self,
        messages: Sequence[Message],
        system: str | None = None,
        enable_thinking: str | None = None,
        tools: str | None = None,
    ) -> list[int]:
        """Ids the model continues to answer the last message.

        Raises:
            UsageError: the last message is an answer. InputError: the chat template refuses the conversation.
        """
        if not messages or messages[-1]["role"] == "assistant":
            raise UsageError("a prompt ends with a user message, not with an answer")
        thinking = self.thinking if enable_thinking is None else parse_thinking(enable_thinking)
        try:
            text = self._render(Conversation(messages, system, tools), thinking, prompt=True)[0]
        except ChatTemplateError as error:
            raise InputError(f"the chat template refuses the conversation ({error})") from error
        return [int(i) for i in self._tokens([(text, [])])[0].ids]

    def ends_answers(self) -> bool:
        """Whether a control token follows every answer, in the text or in the tokens made of it."""
        text = self._render(Conversation(EXAMPLE), self.thinking)[0].rstrip()
        return self.spelling.last(text) is not None or self._ending is not None

    def answers_end_with_eos(self) -> bool:
        """Whether the text of an answered question ends with end-of-text, white space aside."""
        text = self._render(Conversation(EXAMPLE), self.thinking)[0].rstrip()
        return bool(self.tokenizer.eos_token) and text.endswith(str(self.tokenizer.eos_token))

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: end-of-text, and the tokens that stand in its place in the template."""
        ids = [self.tokenizer.token_to_id(token) for token in (self._ending, self._call_ending) if token]
        return list(dict.fromkeys([*super().stop_ids(), *(i for i in ids if i is not None)]))

    def encode_rows(
        self, rows: Sequence[Conversation | PlainTurns], limits: Limits, only_last: bool = False
    ) -> list[Encoded]:
        """Training rows of many conversations, tokenised in one batch.

        Args:
            only_last: nothing but the last answer will be trained.
        """
        rendered = []
        faults: dict[int, str] = {}
        notes: dict[int, str] = {}
        for number, row in enumerate(rows):
            assert isinstance(row, Conversation)
            try:
                text, spans, note = self._trained(row, only_last)
            except ChatTemplateError as error:
                faults[number] = f"the chat template refuses the conversation ({str(error)[:200]})"
                text, spans, note = "", [], ""
            rendered.append((text, spans))
            notes[number] = note
        encoded = []
        for number, laid in enumerate(self._tokens(rendered)):
            made = self._join(laid, limits)
            made.fault, made.note = made.fault or faults.get(number, ""), notes[number]
            encoded.append(made)
        return encoded

    def encode_preferences(self, rows: Sequence[Preference], limits: Limits) -> list[tuple[Encoded, Encoded]]:
        """The prompt with the chosen and with the rejected answer; only these are trained."""
        conversations = [
            Conversation([*_untrained(row.prompt.messages), answer], row.prompt.system, row.prompt.tools)
            for row in rows
            for answer in (row.chosen, row.rejected)
        ]
        encoded = self.encode_rows(conversations, limits)
        return list(zip(encoded[0::2], encoded[1::2], strict=True))

    def encode_prompts(self, rows: Sequence[Conversation], answers: bool) -> list[Encoded]:
        """Prompts of conversations whose last message is an answer, which is left out; earlier ones stay."""
        rendered, faults = [], []
        for row in rows:
            question = Conversation(row.messages[:-1], row.system, row.tools)
            try:
                rendered.append((self._render(question, self.thinking, prompt=True)[0], []))
                faults.append("")
            except ChatTemplateError as error:
                rendered.append(("", []))
                faults.append(f"the chat template refuses the conversation ({str(error)[:200]})")
        laid_out = self._tokens(rendered)
        return [Encoded(i.ids, [], [], len(i.ids), i.fault or f) for i, f in zip(laid_out, faults, strict=True)]

    def text(self, row: Conversation) -> str:
        """The text of a conversation, control tokens as the vocabulary spells them. Raises ChatTemplateError."""
        return self._render(row, self.thinking)[0].replace(BREAK, "")

    def _trained(self, row: Conversation, only_last: bool) -> tuple[str, list[Span], str]:
        """A conversation's text, the trained spans of it in characters, and a remark."""
        text, generated = self._render(row, self.thinking)
        answers = [n for n, message in enumerate(row.messages) if message["role"] in ANSWERS]
        if self.answer_marks is not None:
            opening, closing = map(re.escape, self.answer_marks)
            generated = [found.span() for found in re.finditer(f"{opening}.*?{closing}", text, re.DOTALL)]
        elif not self.chat.marks_answers:
            return self._added(row, text, answers[-1:] if only_last else answers)
        flags = [row.messages[n].get("train") is not False for n in answers]
        if len(generated) == len(answers):
            return text, [span for span, flag in zip(generated, flags, strict=True) if flag], ""
        if all(flags):
            return text, generated, ""
        return text, generated[-1:] if flags[-1] else [], ONLY_LAST  # which part is which answer cannot be told

    def _added(self, row: Conversation, text: str, answers: Sequence[int]) -> tuple[str, list[Span], str]:
        """The spans that each answer's turn adds to what precedes it, checked to be a beginning of the whole."""
        note = ""
        spans = [(n, span) for n in answers if (span := self._turn(row, text, n)) is not None]
        if len(spans) < len(answers):
            note = ONLY_LAST
            spans = [(n, span) for n, span in spans if n == answers[-1]]
        trained = [(n, span) for n, span in spans if row.messages[n].get("train") is not False]
        found = []
        for number, span in trained:
            text, span = self._ended(text, span, bool(_calls(row.messages[number])))
            found.append(span)
        return text, found, note

    def _ended(self, text: str, span: Span, calls: bool) -> tuple[str, Span]:
        """The text and the span of an answer with the token that ends it, where it is not within the span already."""
        start, stop = span
        ending = self._call_ending if calls else self._ending
        if ending is None:
            return text, span
        if stop == len(text):
            text += ending
        following = self.spelling.first(text[stop:])
        return text, (start, stop + len(following or ""))

    @cached_property
    def _ending(self) -> str | None:
        """The control token after an answer that the template does not close, None where it closes answers."""
        return self._after(EXAMPLE[1], Message(role="user", content="c"))

    @cached_property
    def _call_ending(self) -> str | None:
        """The same after a call of a tool."""
        call = Message(role="assistant", content="", calls=[Call(name="f", arguments={})])
        return self._after(call, Message(role="observation", content="c"))

    def _after(self, answer: Message, more: Message) -> str | None:
        """The control token that begins what `more` adds to an answered question, unless the answer ends with one."""
        messages = [EXAMPLE[0], answer]
        try:
            text = self._render(Conversation(messages), self.thinking)[0]
            longer = self._render(Conversation([*messages, more]), self.thinking)[0]
        except ChatTemplateError:
            return None
        last = self.spelling.last(text.rstrip())
        closed = last is not None and last not in self._tags  # a tag closes a call, not the answer
        return self.spelling.first(longer[len(text) :]) if longer.startswith(text) and not closed else None

    def _turn(self, row: Conversation, text: str, number: int) -> Span | None:
        """The span of one answer; None where the text up to it is no beginning of the whole text."""
        upto = self._beginning(text, self._render(row, self.thinking, upto=number + 1)[0])
        if upto is None:
            return None
        prompt = self._render(row, self.thinking, upto=number, prompt=True)[0]
        if upto.startswith(prompt):
            return len(prompt), len(upto)
        # the prompt goes on otherwise than the turn does, e.g. with the beginning of a thought
        if self._beginning(upto, self._render(row, self.thinking, upto=number)[0]) is None:
            return None
        return self.spelling.boundary(upto, len(os.path.commonprefix([prompt, upto]))), len(upto)

    def _beginning(self, text: str, part: str) -> str | None:
        """`part` where the text begins with it, or with all of it but the end-of-text that closes every text."""
        for candidate in (part, part.removesuffix(self.tokenizer.eos_token or "")):
            if text.startswith(candidate):
                return candidate
        return None

    def _render(
        self, row: Conversation, thinking: Thinking, upto: int | None = None, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text of the messages before `upto`, and its generated spans. Raises ChatTemplateError."""
        messages = [self._message(message, thinking) for message in row.messages[:upto]]
        if row.system:
            messages.insert(0, {"role": "system", "content": self._quote(row.system)})
        tools = [_each_text(wrapped(tool), self._quote) for tool in parse_tools(row.tools)] if row.tools else None
        options = {} if thinking == "none" else {"enable_thinking": thinking == "true"}
        try:
            return self.chat.render(messages, tools or None, prompt, **options)
        except ChatTemplateError:
            # some templates write arguments as they are and need text
            spelled = [_with_text_arguments(message) for message in messages]
            if spelled == messages:
                raise
            return self.chat.render(spelled, tools or None, prompt, **options)

    def _message(self, message: Message, thinking: Thinking) -> dict[str, Any]:
        """A message as chat templates read it."""
        role = ROLES[message["role"]]
        if role != "assistant":
            return {"role": role, "content": self._quote(message["content"])}
        calls = _calls(message)
        content = "" if message["role"] == "function" else message["content"]
        thought = message.get("thought")
        if thinking == "false":
            content, thought = THOUGHT.sub("", content), None
        made: dict[str, Any] = {"role": role, "content": self._quote_answer(content)}
        if thought:
            # gpt-oss calls it thinking
            made["reasoning_content"] = made["thinking"] = self._quote_answer(thought)
        if calls:
            made["tool_calls"] = [
                {
                    "type": "function",
                    "function": {
                        "name": self._quote_answer(call["name"]),
                        "arguments": _each_text(arguments_value(call), self._quote_answer),
                    },
                }
                for call in calls
            ]
        return made

    def _tokens(self, rows: Sequence[tuple[str, Sequence[Span]]]) -> list[Laid]:
        """Texts with spans in characters as tokens, all in one batch."""
        texts, spans = [], []
        for text, characters in rows:
            edges = sorted({0, len(text), *(edge for span in characters for edge in span)})
            pieces, places = [""], {0: 0}
            place = 0
            for start, stop in zip(edges, edges[1:], strict=False):
                piece = self.spelling.literal(text[start:stop]).replace(BREAK, "")
                place += len(piece.encode())
                places[stop] = place
                pieces.append(piece)
            texts.append("".join(pieces))
            spans.append([(places[start], places[stop]) for start, stop in characters])
        return laid_out(self.marked, texts, spans, [""] * len(texts))


def _checked(quote: Callable[[str], str]) -> Callable[[str], str]:
    """`quote`, for texts without the characters that mark places here."""

    def quoted(text: str) -> str:
        if any(mark in text for mark in (MARK, BREAK, OPENING, CLOSING)):
            raise ChatTemplateError("its text holds characters that mark places here")
        return quote(text)

    return quoted


def _calls(message: Message) -> list[Call]:
    """The calls of tools that a message makes."""
    return parse_calls(message["content"]) if message["role"] == "function" else list(message.get("calls") or ())


def _untrained(messages: Sequence[Message]) -> list[Message]:
    """The messages, none of them trained."""
    return [{**message, "train": False} if message["role"] in ANSWERS else message for message in messages]


def _with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its calls as JSON text."""
    if "tool_calls" not in message:
        return dict(message)
    calls = [
        {**call, "function": {**call["function"], "arguments": arguments_text(call["function"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """JSON values with every text in them changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_each_text(key, change): _each_text(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_each_text(inner, change) for inner in value]
    return value
