"""Rendering a tokenizer's own chat template, as transformers does, without importing transformers.

The templates are Jinja texts that ship with a model; they run in Jinja's sandbox. `{% generation %}` blocks, which mark
what a model writes, come out as spans of the text.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from mindspeed_llm.errors import InputError

OPENING, CLOSING = "\ufdd2", "\ufdd3"  # noncharacters that stand around generated text until the spans are read off
Span = tuple[int, int]


class ChatTemplateError(Exception):
    """A chat template refuses a conversation; the text is its reason."""


class JinjaChat:
    """A chat template that is ready to render.

    Attributes:
        marks_answers: whether it says itself what the model writes.
        knows_thinking: whether it can be told to think or not to.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """Args:
            source: Jinja text.
            variables: what it may refer to besides the conversation, such as bos_token.

        Raises:
            InputError: it is no Jinja text.
        """
        from jinja2 import TemplateError

        self.marks_answers = False
        self.knows_thinking = "enable_thinking" in source
        self.variables = dict(variables)
        try:
            environment = _environment(self._saw_generation)
            self.template = environment.from_string(source)
        except TemplateError as error:
            raise InputError(f"the tokenizer's chat template cannot be read ({error}); use --prompt-type") from error

    def _saw_generation(self) -> None:
        self.marks_answers = True

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt: bool = False,
        **options: Any,
    ) -> tuple[str, list[Span]]:
        """The conversation's text, and the spans in it that the template marks as generated.

        Args:
            messages: role, content and what else the template reads.
            prompt: end with what the model continues.
            options: further variables, such as enable_thinking.

        Raises:
            ChatTemplateError: the template refuses it.
        """
        from jinja2 import TemplateError

        try:
            text = self.template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self.variables,
                **options,
            )
        except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise ChatTemplateError(str(error) or type(error).__name__) from error
        return _spans(text)


def _environment(saw_generation: Callable[[], None]) -> Any:
    """Jinja's sandbox with what chat templates expect of it."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` ... `{% endgeneration %}`."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's interface

        def parse(self, parser: Any) -> Any:
            """The block as a call of `_marked`."""
            saw_generation()
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            return f"{OPENING}{caller()}{CLOSING}"

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _spans(text: str) -> tuple[str, list[Span]]:
    """The text without the characters around generated parts, and where these are."""
    if OPENING not in text:
        return text, []
    parts: list[str] = []
    spans: list[Span] = []
    place = 0
    for number, piece in enumerate(text.split(OPENING)):
        inside, closed, outside = piece.partition(CLOSING) if number else ("", "", piece)
        if closed:
            spans.append((place, place + len(inside)))
        parts += [inside, outside]
        place += len(inside) + len(outside)
    return "".join(parts), spans
