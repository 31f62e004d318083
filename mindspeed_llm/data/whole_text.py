"""A conversation as one text: what the model sees at inference is what it is trained on.

The whole row is rendered and tokenised at once; the trained part of it is known as spans of the text. Control tokens
are tokens in what the template writes; in what users, systems and tools say they are text; in answers the tags of
thoughts and tool calls are tokens and the others text.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_llm.data.control_tokens import Marked, MarkedTokenizer, SegmentTokenizer, Spelling, collides
from mindspeed_llm.data.layout import ANSWER, PLACEHOLDER, TEXT, Blocks, Format, Special, Template, Turn
from mindspeed_llm.data.tokenizer import Tokenizer

UNTOLD = (
    "this slow tokenizer does not give the text back, so that answers cannot be told from prompts in it; use the "
    "model's tokenizer.json"
)
# added tokens that a model writes itself: tags of thoughts, of tool calls and of their arguments
ANSWER_TAGS = re.compile(r"think|thought|tool|arg_", re.IGNORECASE)


@dataclass
class Laid:
    """A row as tokens.

    Attributes:
        ids: of the whole row, a list or an array.
        spans: (start, stop) of each turn's target.
        fault: why the row cannot be tokenised, empty when it can.
    """

    ids: Any
    spans: list[tuple[int, int]]
    fault: str = ""


class WholeTextEncoder:
    """Turns to token ids, rendered into one text and tokenised together."""

    def __init__(
        self, template: Template, tokenizer: Tokenizer, special: Callable[[str], str], allow_control_tokens: bool
    ) -> None:
        """Args:
        special: text of a `Special` slot by its name.
        allow_control_tokens: control tokens in any text are tokens.
        """
        self.special = special
        added = tokenizer.control_tokens()
        self.spelling = Spelling(list(added))
        self.marked = marked_tokenizer(tokenizer, self.spelling)
        words = "".join(template.thought_words)
        tags = self.answer_tags = [token for token in added if ANSWER_TAGS.search(token) or token in words]
        self._answer = self.spelling.literal if allow_control_tokens else self.spelling.only(tags)
        self._text = self.spelling.literal if allow_control_tokens else str
        self._formats: dict[int, tuple[Format, list[str]]] = {}  # by identity: hashing a format's slots takes longer
        self._literals: dict[str, str] = {}

    def tokenize(self, rows: Sequence[Sequence[Turn]]) -> list[Laid]:
        """The rows as tokens, all in one batch."""
        texts, spans, faults = [], [], []
        for row in rows:
            text, row_spans = self._row(row)
            faults.append("" if text is not None else "its text holds the characters that mark control tokens here")
            texts.append(text or "")
            spans.append(row_spans)
        return laid_out(self.marked, texts, spans, faults)

    def text(self, row: Sequence[Turn]) -> str:
        """The rendered text of a row, control tokens as the vocabulary spells them."""
        return self.spelling.plain(self._row(row)[0] or "")

    def _row(self, turns: Sequence[Turn]) -> tuple[str | None, list[tuple[int, int]]]:
        """A row's marked text, None when its own text collides with the marks, and its targets' spans in bytes."""
        sides: list[str] = []
        spans: list[tuple[int, int]] = []
        place = 0
        try:
            for source, target in turns:
                for side, blocks in enumerate((source, target)):
                    text = self._render(blocks)
                    size = len(text) if text.isascii() else len(text.encode())
                    sides.append(text)
                    if side:
                        spans.append((place, place + size))
                    place += size
        except _CollisionError:
            return None, [(0, 0) for _ in turns]
        return "".join(sides), spans

    def _render(self, blocks: Blocks) -> str:
        """The marked text of some blocks."""
        rendered: list[str] = []
        for block in blocks:
            known = self._formats.get(id(block.format))
            for part in known[1] if known else self._compiled(block.format):
                if part == "{{content}}":
                    for text, author in block.content:
                        rendered.append(self._written(text, author))
                elif part == "{{idx}}":
                    rendered.append(str(block.idx))
                elif part == "{{name}}":
                    rendered.append(self._written(block.name or "", ANSWER))
                elif part == "{{arguments}}":
                    rendered.append(self._written(block.arguments, ANSWER))
                else:
                    rendered.append(part)
        return "".join(rendered)

    def _written(self, text: str, author: str) -> str:
        """A text with the control tokens marked that its author may write."""
        if author not in (TEXT, ANSWER):
            if text not in self._literals:
                self._literals[text] = self.spelling.literal(text)
            return self._literals[text]
        if collides(text):
            raise _CollisionError
        return self._text(text) if author == TEXT else self._answer(text)

    def _compiled(self, layout: Format) -> list[str]:
        """A format as literal texts, marked, and placeholders."""
        parts: list[str] = []
        for slot in layout.slots:
            if isinstance(slot, Special):
                parts.append(self.spelling.literal(self.special(slot.name)))
            else:
                parts += [p if PLACEHOLDER.fullmatch(p) else self.spelling.literal(p) for p in PLACEHOLDER.split(slot)]
        # the format is kept with its parts, so that its identity is not another's later
        self._formats[id(layout)] = (layout, [part for part in parts if part])
        return self._formats[id(layout)][1]


def laid_out(
    marked: Marked, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]], faults: Sequence[str]
) -> list[Laid]:
    """Marked texts with spans in bytes as tokens, all in one batch.

    Args:
        faults: what is already wrong with each, empty for nothing.
    """
    rows = []
    for (ids, found), row, fault in zip(marked.encode_spans(texts, spans), spans, faults, strict=True):
        if found is None:
            rows.append(Laid([], [(0, 0)] * len(row), fault or UNTOLD))
        else:
            rows.append(Laid(ids, found, fault))
    return rows


class _CollisionError(Exception):
    """A text holds marks."""


def marked_tokenizer(tokenizer: Tokenizer, spelling: Spelling) -> MarkedTokenizer | SegmentTokenizer:
    """The tokenizer for texts with marked control tokens.

    Raises:
        InputError: control tokens cannot be told from text.
    """
    rust = tokenizer.rust
    if rust is not None:
        return MarkedTokenizer(rust, spelling)
    return SegmentTokenizer(tokenizer.encode_as_text, tokenizer.decode_as_it_is, spelling, tokenizer.control_tokens())
