"""Templates as upstream lays them out, for `--compat upstream`: its recorded tokens, oddities included.

What differs from the templates proper: tools that cannot be read, or that GLM's formats describe, leave no text but
still open a system block; calls that cannot be read become empty ones; a thought counts only when it is spelled with
the thought words to the letter; a text is filled into its slot first and the turn's number into the outcome.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from mindspeed_llm.data.layout import (
    ANSWER,
    LITERAL,
    TEXT,
    Block,
    Blocks,
    Fragment,
    LFDefaultTemplate,
    Llama2Template,
    ReasoningTemplate,
    Slot,
    Template,
    Thinking,
)
from mindspeed_llm.data.messages import Call, Message
from mindspeed_llm.data.tools import TOOL_FORMATS, PlainTools, TaggedTools, parse_calls


def as_upstream(template: Template) -> Template:
    """The same template with upstream's reading of conversations."""
    return _CLASSES[type(template)](**{field.name: getattr(template, field.name) for field in fields(template)})


def fill(block: Block) -> list[Slot]:
    """The slots of a block, filled; each placeholder is replaced once per slot, in this order.

    A literal `{{idx}}` within a content is therefore replaced too when the slot itself has none.
    """
    if block.name is None:
        number = {} if block.idx is None else {"idx": str(block.idx)}
        parts = {"content": "".join(text for text, _ in block.content), **number}
    else:
        parts = {"name": block.name, "arguments": block.arguments}
    filled: list[Slot] = []
    for slot in block.format.slots:
        if isinstance(slot, str):
            for name, value in parts.items():
                slot = slot.replace("{{" + name + "}}", value, 1)
        filled.append(slot)
    return filled


class _Upstream(Template):
    """Upstream's reading of tools and calls."""

    def system_block(self, system: str, tools: str | None) -> Blocks:
        """The system block, which there is as soon as a row has anything for tools."""
        system = system or self.default_system
        if not system and not tools:
            return []
        fragments: list[Fragment] = [(system, TEXT)] if system else []
        if tools:
            fragments.append((self._tools_text(tools), LITERAL))
        return [Block(self.system, tuple(fragments))]

    def answer(self, message: Message, idx: int) -> Blocks:
        """The answer's text, or its calls; thoughts and calls beside the text are left out."""
        if message["role"] != "function":
            return [Block(self.assistant, ((message["content"], ANSWER),), idx)]
        try:
            calls = parse_calls(message["content"])
        except ValueError:
            calls = [Call(name="", arguments=None)]
        if self.function.takes_content:
            return [Block(self.function, ((self.calls.calls_text(calls), ANSWER),), idx)]
        texts = [(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in calls if call["name"]]
        return [Block(self.function, (), idx, name, text) for name, text in texts or [("", "")]]

    def _tools_text(self, tools: str) -> str:
        """What the formats that upstream can write make of the tools."""
        if not isinstance(self.tools, PlainTools | TaggedTools) or self.tools is TOOL_FORMATS["glm4_moe"]:
            return ""
        try:
            parsed = json.loads(tools)
            if isinstance(self.tools, PlainTools) and any("name" not in tool for tool in parsed):
                return ""
            return "".join(text for text, _ in self.tools.tools_text(parsed, True)) if parsed else ""
        except (ValueError, TypeError, KeyError, AttributeError):
            return ""


@dataclass(frozen=True)
class UpstreamTemplate(_Upstream, Template):
    """See `Template`."""


@dataclass(frozen=True)
class UpstreamLFDefaultTemplate(_Upstream, LFDefaultTemplate):
    """See `LFDefaultTemplate`."""


@dataclass(frozen=True)
class UpstreamLlama2Template(_Upstream, Llama2Template):
    """See `Llama2Template`; the number of a turn is not filled in."""

    def lay_out(self, messages: Sequence[Message], system: str | None, tools: str | None) -> list[Blocks]:
        """As `Llama2Template.lay_out`."""
        return [[block._replace(idx=None) for block in blocks] for blocks in super().lay_out(messages, system, tools)]


@dataclass(frozen=True)
class UpstreamReasoningTemplate(_Upstream, ReasoningTemplate):
    """See `ReasoningTemplate`; a thought is spelled to the letter."""

    @cached_property
    def tags(self) -> tuple[str, str]:
        """The thought words, white space included."""
        return self.thought_words

    @cached_property
    def _thought(self) -> re.Pattern[str]:
        opening, closing = map(re.escape, self.thought_words)
        return re.compile(f"{opening}(.*?){closing}", re.DOTALL)

    def as_history(self, messages: Sequence[Message], thinking: Thinking) -> list[Message]:
        """The messages, no answer with its thought."""
        return [self.without_thought(message) for message in messages]

    def misses_thought(self, content: str) -> bool:
        """Whether an answer holds thought tags in another spelling than the thought words, e.g. on one line."""
        present = any(word in content for word in self.thought_words)
        return not present and any(word.strip() in content for word in self.thought_words)


_CLASSES: dict[type[Template], type[Template]] = {
    Template: UpstreamTemplate,
    LFDefaultTemplate: UpstreamLFDefaultTemplate,
    Llama2Template: UpstreamLlama2Template,
    ReasoningTemplate: UpstreamReasoningTemplate,
}
