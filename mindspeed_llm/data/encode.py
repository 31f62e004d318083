"""Conversations to token ids: one template bound to one tokenizer, for training rows and for prompts alike."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mindspeed_llm.data.cutting import Pair
from mindspeed_llm.data.templates import THINKING, Message, Piece, Pieces, Template, Thinking
from mindspeed_llm.data.tokenizer import Tokenizer
from mindspeed_llm.errors import InputError, UsageError

IGNORE_INDEX = -100  # label of a token that is not trained


@dataclass(frozen=True)
class Conversation:
    """Messages (user or observation and assistant in turn, an even number) and an optional system text."""

    messages: Sequence[Message]
    system: str | None = None


@dataclass(frozen=True)
class Limits:
    """How long a row may become.

    Attributes:
        seq_length: longest row in tokens; None for no limit.
        append_eod: an end-of-text token follows the last turn.
        packed: rows are to share sequences of `seq_length`, of which packing leaves one token free.
    """

    seq_length: int | None = None
    append_eod: bool = False
    packed: bool = False


@dataclass
class Encoded:
    """A row as tokens, before labels are written out.

    Attributes:
        ids: token ids of the whole row.
        spans: (start, stop) of the trained tokens; their label is the token itself, every other label -100.
        eos_at: positions whose label is end-of-text although the token is another one (`efficient_eos`).
        full_length: tokens the row has without cutting; more than `len(ids)` when it was cut.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    eos_at: list[int]
    full_length: int


class ChatEncoder:
    """A template bound to a tokenizer.

    Attributes:
        eos_id, pad_id: after the template's rules: `replace_eos` puts its first stop word in place of the
            tokenizer's end-of-text token; without one `<|endoftext|>` is it; without padding token eos pads.

    Raises:
        InputError: a token the template needs is not in the tokenizer's table.
        UsageError: `enable_thinking` is none of true, false, none.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, enable_thinking: str = "none") -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.thinking = _thinking(enable_thinking)
        self.eos_id = self._end_of_text()
        self.pad_id = self.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        self._stop_words = [self._token(word) for word in template.stop_words]
        self._specials: dict[str, list[int]] = {
            "eos_token": [self.eos_id],
            "bos_token": [] if tokenizer.bos_id is None else [tokenizer.bos_id],
        }

    def encode_multiturn(
        self, messages: Sequence[Message], system: str | None = None, cutoff: int | None = None
    ) -> list[Pair]:
        """(source ids, target ids) of each turn, cut by the template's rule when longer than `cutoff` tokens."""
        pairs = self._tokenize([self.template.turns(messages, system, self.thinking)])[0]
        return pairs if cutoff is None else self.template.cut(pairs, cutoff, cutoff)

    def encode_prompt(
        self, messages: Sequence[Message], system: str | None = None, enable_thinking: str | None = None
    ) -> list[int]:
        """Ids the model continues to answer the last message, which is a user's or a tool's.

        Args:
            messages: history and question; earlier answers lose their thoughts.
            system: system text; None takes the template's default.
            enable_thinking: true, false or none; left out, as the encoder was made.
        """
        if not messages or messages[-1]["role"] == "assistant":
            raise UsageError("a prompt ends with a user message, not with an answer")
        thinking = self.thinking if enable_thinking is None else _thinking(enable_thinking)
        return self._tokenize([[(self.template.prompt(messages, system, thinking), [])]])[0][0][0]

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: end-of-text, the tokenizer's own one, and the template's stop words."""
        own = self.tokenizer.eos_id
        return list(dict.fromkeys([self.eos_id, *self._stop_words, *([] if own is None else [own])]))

    def render_answer(self, ids: Sequence[int]) -> str:
        """Text of a generated answer: what stands before the first stop id, without control tokens."""
        stops = set(self.stop_ids())
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True)

    def answers_end_with_eos(self) -> bool:
        """Whether the template itself closes every answer with end-of-text."""
        return self.eos_id in self._tokenize([[(self.template.assistant.fill("", 0), [])]])[0][0][0]

    def encode_rows(self, rows: Sequence[Conversation], limits: Limits) -> list[Encoded]:
        """Training rows of many conversations, tokenised in one batch."""
        laid_out = [self.template.turns(row.messages, row.system, self.thinking) for row in rows]
        return [self._join(pairs, limits) for pairs in self._tokenize(laid_out)]

    def _join(self, pairs: list[Pair], limits: Limits) -> Encoded:
        """One row from its turns: cut, concatenated, with its trained spans."""
        extra = int(self.template.efficient_eos) + int(limits.append_eod)
        full_length = sum(len(source) + len(target) for source, target in pairs) + extra
        if limits.seq_length is not None:
            room = limits.seq_length - int(limits.packed) - extra
            pairs = self.template.cut(pairs, limits.seq_length, room)
        row = Encoded([], [], [], full_length)
        for number, (source, target) in enumerate(pairs):
            if number and self.template.efficient_eos and source:
                row.eos_at.append(len(row.ids))
            start = len(row.ids) + len(source)
            row.ids += source
            row.ids += target
            row.spans.append((start, start + len(target)))
        if extra:
            row.spans.append((len(row.ids), len(row.ids) + extra))
            row.ids += [self.eos_id] * extra
        return row

    def _tokenize(self, rows: Sequence[Sequence[tuple[Pieces, Pieces]]]) -> list[list[Pair]]:
        """Ids in place of pieces; each distinct text goes through the tokenizer once, all in one batch."""
        texts = {piece for row in rows for turn in row for side in turn for piece in side if isinstance(piece, str)}
        texts.discard("")
        ordered = list(texts)
        table: dict[Piece, list[int]] = dict(zip(ordered, self.tokenizer.encode_batch(ordered), strict=True))
        table[""] = []
        return [[(self._ids(source, table), self._ids(target, table)) for source, target in row] for row in rows]

    def _ids(self, pieces: Iterable[Piece], table: dict[Piece, list[int]]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids += table[piece] if isinstance(piece, str) else self._special(piece.name)
        return ids

    def _special(self, name: str) -> list[int]:
        if name not in self._specials:
            self._specials[name] = [self._token(name)]
        return self._specials[name]

    def _end_of_text(self) -> int:
        if self.template.replace_eos and self.template.stop_words:
            return self._token(self.template.stop_words[0])
        own = self.tokenizer.eos_id
        return self._token("<|endoftext|>") if own is None else own

    def _token(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise InputError(
                f"template {self.template.name!r} needs the token {token!r}, which the tokenizer in "
                f"{self.tokenizer.path} does not have; choose the template made for this model"
            )
        return token_id


def _thinking(value: str) -> Thinking:
    for known in THINKING:
        if value.lower() == known:
            return known
    raise UsageError(f"--enable-thinking {value!r} is not one of {', '.join(THINKING)}")
