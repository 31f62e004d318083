"""Telling control tokens from text that merely looks like them.

A tokenizer turns every occurrence of an added token's text into that token. Here a second tokenizer with the same
model is made, whose added tokens are spelled with characters that no text holds (a Unicode noncharacter and a
private-use character): what the template writes is spelled that way, and what people write stays what it is. For text
without control tokens both tokenizers give the same ids.
"""

import json
import os
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from mindspeed_llm.data.word_table import WordTable, word_table
from mindspeed_llm.errors import InputError

MARK = "\ufdd0"  # a noncharacter: valid in strings, meant for use within a program
FIRST = 0x100000  # the marked tokens are numbered in the last private-use plane
_MARKED = re.compile(MARK + "[\U00100000-\U0010ffff]")
_SPLIT = re.compile(f"({_MARKED.pattern})")
REPLACED = "\ufffd"  # stands for bytes that are no character
Span = tuple[int, int]


class Marked(Protocol):
    """A tokenizer for texts in which control tokens are marked."""

    def encode_spans(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> Sequence[tuple[Any, list[Span] | None]]:
        """Ids of each text, and its spans (start and stop in UTF-8 bytes) in tokens: those that hold any of them; None
        where the tokenizer does not let these be told."""


class Spelling:
    """The marked spelling of the control tokens of a vocabulary."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.marks = {token: MARK + chr(FIRST + number) for number, token in enumerate(tokens)}
        self._every = _any_of(tokens)

    def literal(self, text: str) -> str:
        """The text with every control token in it marked."""
        return text if self._every is None else self._every.sub(self._mark, text)

    def only(self, tokens: Sequence[str]) -> Callable[[str], str]:
        """A function that marks these tokens alone."""
        pattern = _any_of([token for token in tokens if token in self.marks])
        if pattern is None:
            return str
        begins = {token[0] for token in tokens if token in self.marks}
        first = begins.pop() if len(begins) == 1 else ""
        return lambda text: pattern.sub(self._mark, text) if first in text else text

    def breaker(self, character: str, spared: Sequence[str] = ()) -> Callable[[str], str]:
        """A function that puts `character` into every control token of a text, those `spared` left aside."""
        pattern = _any_of([token for token in self.marks if token not in spared])
        if pattern is None:
            return str
        return lambda text: pattern.sub(lambda found: found[0][:1] + character + found[0][1:], text)

    def boundary(self, text: str, place: int) -> int:
        """The place, or the beginning of the control token within which it lies."""
        matches = self._every.finditer(text) if self._every is not None else iter(())
        return next((found.start() for found in matches if found.start() < place < found.end()), place)

    def first(self, text: str) -> str | None:
        """The control token that a text begins with."""
        found = self._every.match(text) if self._every is not None else None
        return found[0] if found else None

    def last(self, text: str) -> str | None:
        """The control token that a text ends with."""
        return max((token for token in self.marks if text.endswith(token)), key=len, default=None)

    def plain(self, text: str) -> str:
        """A marked text with its control tokens as the vocabulary spells them."""
        tokens = list(self.marks)
        return _MARKED.sub(lambda found: tokens[ord(found[0][1]) - FIRST], text)

    def _mark(self, found: re.Match[str]) -> str:
        return self.marks[found[0]]


def collides(text: str) -> bool:
    """Whether a text, against all odds, holds what marks control tokens here."""
    return MARK in text and _MARKED.search(text) is not None


class MarkedTokenizer:
    """The tokenizer of the `tokenizers` library whose control tokens are marked."""

    def __init__(self, rust: Any, spelling: Spelling) -> None:
        """Args:
            rust: the tokenizer with its own spelling of control tokens.
            spelling: of those control tokens.

        Raises:
            InputError: its control tokens cannot be told from text.
        """
        from tokenizers import AddedToken, Tokenizer

        self.inner = Tokenizer(rust.model)  # the model is shared, not copied
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if getattr(rust, part) is not None:
                setattr(self.inner, part, getattr(rust, part))
        added = sorted(rust.get_added_tokens_decoder().items())
        for _, token in added:
            flags = {
                name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            self.inner.add_tokens([AddedToken(spelling.marks[token.content], **flags)])
        self.ids = np.arange(self.inner.get_vocab_size(with_added_tokens=True), dtype=np.int32)
        for token_id, token in added:
            self.ids[self.inner.token_to_id(spelling.marks[token.content])] = token_id
        self._same_ids = bool((self.ids == np.arange(len(self.ids))).all())
        self._of_normal = self._without_normalizer()
        self._check(rust, spelling, [token.content for _, token in added])
        self._table: WordTable | None = None
        takes_space = any(token.lstrip or token.rstrip or token.single_word for _, token in added)
        marked = {mark: self.inner.token_to_id(mark) for mark in spelling.marks.values()}
        lengths = self._lengths
        if not takes_space and lengths is not None:
            self._table = word_table(self._of_normal, _MARKED.pattern, marked, lengths)

    def _check(self, rust: Any, spelling: Spelling, tokens: Sequence[str]) -> None:
        """Raise unless both tokenizers agree on every control token between words."""
        texts = [f"a {token}b" for token in tokens]
        ours = self.inner.encode_batch_fast([spelling.literal(text) for text in texts], add_special_tokens=False)
        theirs = rust.encode_batch_fast(texts, add_special_tokens=False)
        for token, mine, other in zip(tokens, ours, theirs, strict=True):
            if self.ids[mine.ids].tolist() != other.ids:
                raise InputError(
                    f"control token {token!r} of this tokenizer cannot be told from text that looks like it; let such "
                    "text become tokens with --allow-control-tokens"
                )

    @cached_property
    def _lengths(self) -> np.ndarray | None:
        """UTF-8 bytes of each token's text by id [vocabulary] int32; None for tokenizers that do not keep to bytes."""
        steps = _parts(self.inner.pre_tokenizer, "pretokenizers")
        byte_level = [step for step in steps if step["type"] == "ByteLevel"]
        if not byte_level or any(step["add_prefix_space"] for step in byte_level):
            return None
        if any(step["type"] != "NFC" for step in _parts(self.inner.normalizer, "normalizers")):
            return None
        lengths = np.zeros(len(self.ids), np.int32)
        for token, token_id in self.inner.get_vocab(with_added_tokens=True).items():
            # a token of the model has one character per byte, an added one is its own text
            lengths[token_id] = len(token.encode()) if token.startswith(MARK) else len(token)
        return lengths

    def encode_spans(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[tuple[Any, list[Span]]]:
        """See `Marked`. A token that holds bytes on both sides of a boundary belongs to both."""
        if self._lengths is None:
            return self._by_offsets(texts, spans)
        sizes = np.array([len(text) if text.isascii() else len(text.encode()) for text in texts], np.int64)
        encoded = self._by_words(texts)
        raw, rows, places = self._gathered(encoded)
        others = np.flatnonzero(np.diff(places[rows]) != sizes).tolist()
        if others:
            # a text the normaliser would change has no tokens here, which tells it from the others below
            normal = [texts[n] if self._is_normal(texts[n]) else "" for n in others]
            found = self._of_normal.encode_batch_fast(normal, add_special_tokens=False)
            for n, ids in zip(others, (row.ids for row in found), strict=True):
                encoded[n] = np.fromiter(ids, np.int32, len(ids)).tobytes()
            raw, rows, places = self._gathered(encoded)
        begins = places[rows]
        turns = np.fromiter(map(len, spans), np.int64, len(spans))
        bounds = np.array([span for row in spans for span in row], np.int64).reshape(-1, 2)
        bounds += np.repeat(begins[:-1], turns)[:, None]
        told = (_token_spans(places, bounds) - np.repeat(rows[:-1], turns)[:, None]).tolist()
        ids, edges = raw if self._same_ids else self.ids[raw], rows.tolist()
        exact = (np.diff(begins) == sizes).tolist()
        results: list[tuple[Any, list[Span] | None]] = []
        at = 0
        for n, row in enumerate(spans):
            if exact[n]:
                token_spans = [(start, stop) for start, stop in told[at : at + len(row)]]
                results.append((ids[edges[n] : edges[n + 1]], token_spans))
            else:
                results += self._by_offsets([texts[n]], [row])
            at += len(row)
        return results

    def _by_words(self, texts: Sequence[str]) -> list[bytes | None]:
        """Ids of each text by the table of words, None where that is not known to be right."""
        if self._table is None:
            return [None] * len(texts)
        if self.inner.normalizer is None:
            return self._table.encode(texts)
        normal = [text if self._is_normal(text) else "" for text in texts]
        return self._table.encode(normal)

    def _gathered(self, encoded: Sequence[bytes | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of all texts [tokens], where each text begins in them [texts + 1], where each token begins in bytes of
        text [tokens + 1]."""
        raw = np.frombuffer(b"".join(row or b"" for row in encoded), np.int32)
        counts = np.array([len(row) // 4 if row else 0 for row in encoded], np.int64)
        rows = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum(counts, out=rows[1:])
        places = np.zeros(len(raw) + 1, np.int64)
        np.cumsum(self._lengths[raw], out=places[1:])
        return raw, rows, places

    def _is_normal(self, text: str) -> bool:
        """Whether the normaliser leaves the text as it is."""
        return self.inner.normalizer is None or text.isascii() or unicodedata.is_normalized("NFC", text)

    def _without_normalizer(self) -> Any:
        """The tokenizer for texts in normal form, whose normalisation would take a tenth of the time."""
        from tokenizers import Tokenizer

        if self.inner.normalizer is None:
            return self.inner
        copy = Tokenizer(self.inner.model)
        for part in ("pre_tokenizer", "decoder"):
            if getattr(self.inner, part) is not None:
                setattr(copy, part, getattr(self.inner, part))
        copy.add_tokens([token for _, token in sorted(self.inner.get_added_tokens_decoder().items())])
        return copy

    def _by_offsets(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[tuple[Any, list[Span]]]:
        """As `encode_spans`, by the tokens' places as the library tells them."""
        results: list[tuple[Any, list[Span]]] = []
        for text, row, found in zip(
            texts, spans, self.inner.encode_batch(list(texts), add_special_tokens=False), strict=True
        ):
            begins = [begin for begin, _ in found.offsets]
            ends = [max(end, begin + 1) for begin, end in found.offsets]  # a token without text belongs to what follows
            token_spans = []
            for start, stop in ((_characters(text, edge[0]), _characters(text, edge[1])) for edge in row):
                first = bisect_right(ends, start)
                token_spans.append((first, max(first, bisect_left(begins, stop)) if stop > start else first))
            results.append((self.ids[np.array(found.ids, np.int64)], token_spans))
        return results


class SegmentTokenizer:
    """Any tokenizer, given what stands between control tokens bit by bit; the way of slow tokenizers.

    These do not tell where a token stands. It is read off the text of the first n tokens, which grows with n; where
    that is not the text itself, as with tokenizers that change letters or spaces, no place can be told.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        spelling: Spelling,
        ids: Mapping[str, int],
    ) -> None:
        """Args:
        encode: ids of a text in which control tokens are text.
        decode: text of ids, nothing tidied.
        ids: of the control tokens.
        """
        self.encode = encode
        self.decode = decode
        self.ids = {mark: ids[token] for token, mark in spelling.marks.items()}

    def encode_spans(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[tuple[Any, list[Span] | None]]:
        """See `Marked`."""
        return [self._one(text, row) for text, row in zip(texts, spans, strict=True)]

    def _one(self, text: str, spans: Sequence[Span]) -> tuple[Any, list[Span] | None]:
        ids: list[int] = []
        pieces: list[tuple[int, int, str, list[int]]] = []  # first character, first token, text, ids
        place = 0
        for piece in _SPLIT.split(text):
            own = [self.ids[piece]] if piece in self.ids else self.encode(piece) if piece else []
            pieces.append((place, len(ids), piece, own))
            ids += own
            place += len(piece)
        found: list[Span] | None = []
        for span in spans:
            edges = [self._edge(pieces, _characters(text, place), side) for side, place in enumerate(span)]
            if found is None or edges[0] is None or edges[1] is None:
                found = None
            else:
                found.append((edges[0], max(edges) if span[1] > span[0] else edges[0]))
        return np.array(ids, np.int32), found

    def _edge(self, pieces: Sequence[tuple[int, int, str, list[int]]], place: int, side: int) -> int | None:
        """The first token that holds text from a character on (side 0), or the first that holds nothing before it."""
        begin, at, piece, own = pieces[max(bisect_right(pieces, place, key=lambda entry: entry[0]) - 1, 0)]
        if place - begin in (0, len(piece)) or piece in self.ids:
            return at + (len(own) if place > begin else 0)
        if REPLACED in piece or self.decode(own) != piece:
            return None
        count = self._holding(piece, own, place - begin)
        ends_there = self.decode(own[:count]) == piece[: place - begin]
        return at + (count if side or ends_there else count - 1)

    def _holding(self, piece: str, ids: list[int], size: int) -> int:
        """How many of a piece's tokens it takes to hold its first `size` characters.

        Where a character is divided among tokens, the text of some of them may hide characters before it: the four
        tokens before the place that the search finds, as many as a character has bytes, are looked at again.
        """

        def holds(count: int) -> bool:
            return len(os.path.commonprefix([piece, self.decode(ids[:count])])) >= size

        found, before = len(ids), len(ids)
        while before is not None:
            found = bisect_left(range(before), True, key=holds)
            before = next((n for n in range(found - 1, max(found - 5, -1), -1) if holds(n)), None)
        return found


def _token_spans(places: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Byte spans [spans, 2] in tokens [spans, 2]: the tokens that hold any byte of the span.

    Args:
        places: where each token begins, and where the last one ends [tokens + 1].
    """
    starts = np.searchsorted(places[1:], bounds[:, 0], side="right")
    stops = np.searchsorted(places[:-1], bounds[:, 1], side="left")
    return np.stack([starts, np.where(bounds[:, 1] > bounds[:, 0], np.maximum(starts, stops), starts)], axis=1)


def _characters(text: str, place: int) -> int:
    """A place in a text's UTF-8 bytes, in characters."""
    return place if text.isascii() else len(text.encode()[:place].decode())


def _any_of(tokens: Sequence[str]) -> re.Pattern[str] | None:
    """A pattern for any of the tokens, the longest first."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _parts(component: Any, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normaliser or pre-tokeniser, sequences taken apart."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return state[inner] if state["type"] == "Sequence" else [state]
