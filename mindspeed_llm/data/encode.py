"""Conversations to token ids: one template bound to one tokenizer, for training rows and for prompts alike.

Two ways: as one text (default), and slot by slot as upstream does it (`compat="upstream"`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_llm.data.cutting import Pair
from mindspeed_llm.data.layout import CONTENT, TEXT, THINKING, Block, Special, Template, Thinking, Turn
from mindspeed_llm.data.messages import Conversation, Message, PlainTurns, Preference
from mindspeed_llm.data.plain_turns import as_turns, plain_row
from mindspeed_llm.data.slots import SlotEncoder
from mindspeed_llm.data.tokenizer import Tokenizer
from mindspeed_llm.data.upstream import as_upstream
from mindspeed_llm.data.whole_text import Laid, WholeTextEncoder
from mindspeed_llm.errors import InputError, UsageError, unknown

__all__ = ["COMPAT", "IGNORE_INDEX", "ChatEncoder", "Conversation", "Encoded", "Limits", "Message"]

IGNORE_INDEX = -100  # label of a token that is not trained
COMPAT = ("upstream",)
# how control tokens are spelled in templates
LIKE_A_TOKEN = re.compile(r"<[|｜][^<>\s]+[|｜]>|<[a-z]+_of_[a-z]+>|<reserved_\d+>|\[gMASK\]|<sop>")


@dataclass(frozen=True)
class Limits:
    """How long a row may become.

    Attributes:
        seq_length: longest row in tokens; None for no limit.
        append_eod: an end-of-text token follows the last turn.
        packed: rows are to share sequences of `seq_length`, of which packing leaves one token free.
        neat: packed rows are to be told apart in the attention mask; upstream cuts them otherwise (`compat` only).
    """

    seq_length: int | None = None
    append_eod: bool = False
    packed: bool = False
    neat: bool = False


@dataclass
class Encoded:
    """A row as tokens, before labels are written out.

    Attributes:
        ids: token ids of the whole row, a list or an array.
        spans: (start, stop) of the trained tokens; their label is the token itself, every other label -100.
        eos_at: positions whose label is end-of-text although the token is another one (`compat` only).
        full_length: tokens the row has without cutting; more than `len(ids)` when it was cut.
        fault: why the row cannot be tokenised, empty when it can.
        note: what a user should know about the row, the same for all rows of that kind; empty for nothing.
    """

    ids: Any
    spans: list[tuple[int, int]]
    eos_at: list[int]
    full_length: int
    fault: str = ""
    note: str = ""


class ChatEncoder:
    """A template bound to a tokenizer.

    Attributes:
        eos_id, pad_id: after the template's rules: `replace_eos` puts its first stop word in place of the
            tokenizer's end-of-text token; without one `<|endoftext|>` is it; without padding token eos pads.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Tokenizer,
        enable_thinking: str = "none",
        compat: str | None = None,
        allow_control_tokens: bool = False,
    ) -> None:
        """Args:
            enable_thinking: true, false or none.
            compat: "upstream" for its tokens, None for this package's own.
            allow_control_tokens: text of users, systems and tools that spells a control token becomes that token.

        Raises:
            InputError: a token the template needs is not in the tokenizer's table.
            UsageError: an unknown mode.
        """
        if compat is not None and compat not in COMPAT:
            raise unknown("--compat", compat, COMPAT)
        self.upstream = compat == "upstream"
        self.template = as_upstream(template) if self.upstream else template
        # upstream appends stop words that the table lacks, with ids beyond it
        self.tokenizer = tokenizer.with_special_tokens(template.stop_words) if self.upstream else tokenizer
        self.thinking = parse_thinking(enable_thinking)
        self.eos_id = self._end_of_text()
        self.pad_id = self.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        self._stop_words = [self._token(word) for word in template.stop_words]
        self._specials: dict[str, list[int]] = {
            "eos_token": [self.eos_id],
            "bos_token": [] if tokenizer.bos_id is None else [tokenizer.bos_id],
        }
        for slot in template.written():
            if isinstance(slot, Special):
                self._special(slot.name)
        self._way: SlotEncoder | WholeTextEncoder
        if self.upstream:
            self._way = SlotEncoder(self.tokenizer, self._special)
        else:
            self._way = WholeTextEncoder(template, tokenizer, self._special_text, allow_control_tokens)

    def encode_multiturn(
        self, messages: Sequence[Message], system: str | None = None, cutoff: int | None = None
    ) -> list[Pair]:
        """(source ids, target ids) of each turn, cut by the template's rule when longer than `cutoff` tokens."""
        pairs = _pairs(self._way.tokenize([self.template.turns(messages, system, self.thinking)])[0])
        return pairs if cutoff is None else self.template.cut(pairs, cutoff, cutoff)

    def encode_prompt(
        self,
        messages: Sequence[Message],
        system: str | None = None,
        enable_thinking: str | None = None,
        tools: str | None = None,
    ) -> list[int]:
        """Ids the model continues to answer the last message, which is a user's or a tool's.

        Args:
            messages: history and question; earlier answers lose their thoughts.
            system: system text; None takes the template's default.
            enable_thinking: true, false or none; left out, as the encoder was made.
            tools: JSON text of the tools.
        """
        if not messages or messages[-1]["role"] == "assistant":
            raise UsageError("a prompt ends with a user message, not with an answer")
        thinking = self.thinking if enable_thinking is None else parse_thinking(enable_thinking)
        prompt = self.template.prompt(messages, system, thinking, tools)
        return [int(i) for i in self._way.tokenize([[(prompt, [])]])[0].ids]

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: end-of-text, the tokenizer's own one, and the template's stop words."""
        own = self.tokenizer.eos_id
        return list(dict.fromkeys([self.eos_id, *self._stop_words, *([] if own is None else [own])]))

    def render_answer(self, ids: Sequence[int]) -> str:
        """Text of a generated answer: what stands before the first stop id, without control tokens."""
        stops = set(self.stop_ids())
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True)

    def ends_answers(self) -> bool:
        """Whether a control token follows every answer, so that generation can stop there."""
        if self.template.efficient_eos:
            return True
        known = set(self.tokenizer.control_tokens().values())
        closing = self._way.tokenize([[([Block(self.template.assistant)], [])]])[0].ids
        return not known.isdisjoint(int(i) for i in closing)

    def answers_end_with_eos(self) -> bool:
        """Whether the template itself closes every answer with end-of-text."""
        return self.eos_id in self._way.tokenize([[([Block(self.template.assistant)], [])]])[0].ids

    def unknown_tokens(self) -> list[str]:
        """What the template writes like a control token and the tokenizer does not know: it becomes text."""
        texts = [slot for slot in self.template.written() if isinstance(slot, str)]
        spelled = dict.fromkeys(found for text in texts for found in LIKE_A_TOKEN.findall(text))
        return [token for token in spelled if self.tokenizer.token_to_id(token) is None]

    def misses_thought(self, content: str) -> bool:
        """Whether an answer holds thought tags that are not a whole thought."""
        return self.template.misses_thought(content)

    def encode_rows(
        self, rows: Sequence[Conversation | PlainTurns], limits: Limits, only_last: bool = False
    ) -> list[Encoded]:
        """Training rows of many conversations, tokenised in one batch.

        Args:
            only_last: nothing but the last answer will be trained, so that what precedes it can be as in a prompt.
        """
        turns = [self._turns(row, only_last) for row in rows]
        laid_out = iter(self._way.tokenize([row for row in turns if row is not None]) if any(turns) else [])
        encoded = []
        for row, whole in zip(rows, turns, strict=True):
            laid = None if whole is None else next(laid_out)
            if isinstance(row, Conversation) and laid is not None:
                encoded.append(self._training_row(row, laid, limits))
            elif isinstance(row, PlainTurns):
                encoded.append(self._plain(row, laid, limits))
        return encoded

    def _turns(self, row: Conversation | PlainTurns, only_last: bool) -> Sequence[Turn] | None:
        """The turns of a row that is tokenised as one text, None for other ones; of conversations just one where the
        others are not trained and have thoughts that prompts leave out."""
        if isinstance(row, PlainTurns):
            return as_turns(row) if row.whole and not self.upstream else None
        as_prompt = only_last and self.template.uses_thinking and not self.upstream
        if as_prompt and row.messages[-1].get("train") is not False:
            return [self.template.final_turn(row.messages, row.system, self.thinking, row.tools)]
        return self.template.turns(row.messages, row.system, self.thinking, row.tools)

    def encode_preferences(self, rows: Sequence[Preference], limits: Limits) -> list[tuple[Encoded, Encoded]]:
        """The prompt with the chosen and with the rejected answer; only answers are trained.

        Both answers follow the same prompt: where one of them has a thought, the other opens with an empty one.
        Upstream takes the prompt of the chosen one, neither cuts these rows nor adds the token of `append_eod`.
        """
        if self.upstream:
            limits = Limits()
        turns: list[Sequence[Turn]] = []
        for row in rows:
            (prompt, chosen), (other_prompt, rejected) = self._answered(row, self.thinking)
            if prompt != other_prompt and not self.upstream:
                (prompt, chosen), (_, rejected) = self._answered(row, "true")
            turns += [[(prompt, chosen)], [(prompt, rejected)]]
        encoded = [self._join(laid, limits) for laid in self._way.tokenize(turns)]
        return list(zip(encoded[0::2], encoded[1::2], strict=True))

    def _answered(self, row: Preference, thinking: Thinking) -> list[Turn]:
        """The prompt before, and the blocks of, either answer."""
        system, tools = row.prompt.system, row.prompt.tools
        return [
            self.template.final_turn([*row.prompt.messages, answer], system, thinking, tools)
            for answer in (row.chosen, row.rejected)
        ]

    def encode_prompts(self, rows: Sequence[Conversation], answers: bool) -> list[Encoded]:
        """Prompts of conversations whose last message is an answer, which is left out.

        Args:
            answers: earlier answers stand in the prompt, which upstream's prompts for PPO leave out (`compat` only).
        """
        prompts: list[Sequence[Turn]] = []
        for row in rows:
            conversation = (row.messages, row.system, self.thinking, row.tools)
            if self.upstream:
                turns = self.template.turns(*conversation)
                sides = [[*source, *(target if answers else [])] for source, target in turns[:-1]]
                prompts.append([([block for side in [*sides, turns[-1][0]] for block in side], [])])
            else:
                prompts.append([(self.template.final_turn(*conversation)[0], [])])
        return [Encoded(laid.ids, [], [], len(laid.ids), laid.fault) for laid in self._way.tokenize(prompts)]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as they are, whatever stands in them; control tokens are text unless in `compat`."""
        if self.upstream:
            return self.tokenizer.encode_batch(texts)
        return self._pieces(texts)

    def _training_row(self, row: Conversation, laid: Laid, limits: Limits) -> Encoded:
        """A row of a conversation; messages that say so are not trained."""
        encoded = self._join(laid, limits)
        if not any("train" in message for message in row.messages):
            return encoded
        answers = [message for message in row.messages if message["role"] in ("assistant", "function")]
        if len(laid.spans) < len(answers):  # the last answer alone, which is trained
            return encoded
        left_out = [laid.spans[n] for n, answer in enumerate(answers) if answer.get("train") is False]
        if left_out:
            kept = [span for span in encoded.spans if not any(a <= span[0] < max(b, a + 1) for a, b in left_out)]
            encoded.spans = kept
        return encoded

    def _plain(self, row: PlainTurns, laid: Laid | None, limits: Limits) -> Encoded:
        """A row that its handler lays out, `laid` where it has been tokenised as one text."""
        if laid is not None:
            return self._join(laid, limits, template_ends=False)
        encode = self.tokenizer.encode_batch if self.upstream else self._pieces
        ids, spans, eos_at = plain_row(row, encode, self.eos_id)
        return self._join(Laid(ids, spans), limits, eos_at, template_ends=False)

    def _pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, control tokens in them being text."""
        rows: list[Sequence[Turn]] = [[([Block(CONTENT, ((text, TEXT),))], [])] for text in texts]
        return [[int(i) for i in laid.ids] for laid in self._way.tokenize(rows)]

    def _join(self, laid: Laid, limits: Limits, eos_at: Sequence[int] = (), template_ends: bool = True) -> Encoded:
        """One row from its turns: cut, with its trained spans and what ends it."""
        efficient = self.template.efficient_eos and template_ends
        extra = int(efficient) + int(limits.append_eod)
        full_length = len(laid.ids) + extra
        if self.upstream:
            laid = self._cut_as_upstream(laid, limits)
        elif limits.seq_length is not None:
            room = limits.seq_length - int(limits.packed) - extra
            if len(laid.ids) > room or len(laid.ids) > limits.seq_length - 1:
                laid = _joined(self.template.cut(_pairs(laid), limits.seq_length, room))
        row = Encoded(laid.ids, list(laid.spans), list(eos_at), full_length, laid.fault)
        if efficient:
            self._end_turns(row)
        if extra:
            row.spans.append((len(row.ids), len(row.ids) + extra))
            row.ids = [*row.ids, *[self.eos_id] * extra]
        return row

    def _end_turns(self, row: Encoded) -> None:
        """What tells the model of an `efficient_eos` template to stop: the token after the answer where it is a stop
        word; upstream labels that position end-of-text whatever the token is."""
        following = [stop for _, stop in row.spans[:-1] if stop < len(row.ids)]
        if self.upstream:
            row.eos_at += following
        else:
            row.spans += [(place, place + 1) for place in following if row.ids[place] in self._stop_words]
            row.spans.sort()

    def _cut_as_upstream(self, laid: Laid, limits: Limits) -> Laid:
        """The turns cut to the length, or to what upstream takes for unlimited."""
        length = limits.seq_length or 100_000
        pairs = _pairs(laid)
        cut = self.template.cut(pairs, length, length)
        return laid if cut == pairs else _joined(cut)

    def _special(self, name: str) -> list[int]:
        if name not in self._specials:
            self._specials[name] = [self._token(name)]
        return self._specials[name]

    def _special_text(self, name: str) -> str:
        return "".join(self.tokenizer.id_to_token(i) or "" for i in self._special(name))

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


def parse_thinking(value: str) -> Thinking:
    """A thinking mode, in any case of letters. Raises UsageError when it is none."""
    for known in THINKING:
        if value.lower() == known:
            return known
    raise UsageError(f"--enable-thinking {value!r} is not one of {', '.join(THINKING)}")


def _pairs(laid: Laid) -> list[Pair]:
    """The turns of a row as (source ids, target ids)."""
    ids = [int(i) for i in laid.ids]
    pairs: list[Pair] = []
    at = 0
    for start, stop in laid.spans:
        begin = max(start, at)
        pairs.append((ids[at:begin], ids[begin:stop]))
        at = max(stop, begin)
    return pairs


def _joined(pairs: Sequence[Pair]) -> Laid:
    """A row of its turns."""
    laid = Laid([], [])
    for source, target in pairs:
        laid.ids += source
        start = len(laid.ids)
        laid.ids += target
        laid.spans.append((start, len(laid.ids)))
    return laid
