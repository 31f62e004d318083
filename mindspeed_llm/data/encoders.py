"""Which encoder a template's name stands for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mindspeed_llm.data.encode import ChatEncoder, Encoded, Limits
from mindspeed_llm.data.handlers import Handler
from mindspeed_llm.data.handlers_sharegpt import HunyuanInstructionHandler
from mindspeed_llm.data.layout import Template
from mindspeed_llm.data.messages import Conversation, Message, PlainTurns, Preference
from mindspeed_llm.data.templates import get_template
from mindspeed_llm.data.tokenizer import Tokenizer

CHAT_TEMPLATE = "hf"  # the name of the tokenizer's own template


class Encoder(Protocol):
    """A template bound to a tokenizer; the methods are described at `ChatEncoder`."""

    template: Template
    tokenizer: Tokenizer
    thinking: str
    eos_id: int
    pad_id: int

    def encode_rows(
        self, rows: Sequence[Conversation | PlainTurns], limits: Limits, only_last: bool = False
    ) -> list[Encoded]:
        """Training rows."""

    def encode_preferences(self, rows: Sequence[Preference], limits: Limits) -> list[tuple[Encoded, Encoded]]:
        """Prompts with the chosen and with the rejected answer."""

    def encode_prompts(self, rows: Sequence[Conversation], answers: bool) -> list[Encoded]:
        """Prompts of conversations whose last message is an answer."""

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as they are."""

    def encode_prompt(
        self,
        messages: Sequence[Message],
        system: str | None = None,
        enable_thinking: str | None = None,
        tools: str | None = None,
    ) -> list[int]:
        """Ids that the model continues."""

    def stop_ids(self) -> list[int]:
        """Ids that end an answer."""

    def render_answer(self, ids: Sequence[int]) -> str:
        """Text of a generated answer."""

    def ends_answers(self) -> bool:
        """Whether a control token follows every answer."""

    def answers_end_with_eos(self) -> bool:
        """Whether every answer is closed with end-of-text."""

    def unknown_tokens(self) -> list[str]:
        """What the template writes like a control token and the tokenizer does not know."""

    def misses_thought(self, content: str) -> bool:
        """Whether an answer holds thought tags that are not a whole thought."""


def make_encoder(
    template: str,
    template_file: str | Path | None,
    tokenizer: Tokenizer,
    enable_thinking: str = "none",
    compat: str | None = None,
    allow_control_tokens: bool = False,
    answer_marks: tuple[str, str] | None = None,
) -> Encoder:
    """The encoder of the template called `template`; "hf" is the tokenizer's own chat template.

    Args:
        template_file: file of templates, None for this repository's.
        answer_marks: tokens that open and close an answer in the text of the chat template.

    Raises:
        UsageError: no template of that name, or an unknown mode.
        InputError: a token the template needs is missing, or the tokenizer has no chat template.
    """
    if template != CHAT_TEMPLATE:
        return ChatEncoder(
            get_template(template, template_file), tokenizer, enable_thinking, compat, allow_control_tokens
        )
    from mindspeed_llm.data.chat_template import HfEncoder

    return HfEncoder(tokenizer, enable_thinking, allow_control_tokens or compat is not None, answer_marks)


def answer_marks(handler: Handler) -> tuple[str, str] | None:
    """The tokens between which a handler's answers stand in the chat template's text; None for most handlers."""
    return ("<|extra_0|>", "<|eos|>") if isinstance(handler, HunyuanInstructionHandler) else None
