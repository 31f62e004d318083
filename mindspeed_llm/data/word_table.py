"""Tokenising by a table of the words met so far: several times faster than the tokenizer library, with the same ids.

A byte-level BPE tokenizer divides a text into words by a regular expression, and the ids of a word depend on nothing
but the word. Most words of a text have come before. So words are found by `re` (see `split_pattern`), their ids are
looked up, and only new ones go through the library. What a table cannot do exactly it leaves to the library: texts with
characters outside its alphabet, and texts of mostly new words, such as Chinese ones, whose words are whole clauses.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from mindspeed_llm.data.split_pattern import WHOLE, Untranslatable, alphabet, explicit

# the expression of tokenizers whose ByteLevel step divides the text itself: GPT-2's
BYTE_LEVEL_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MOST_WORDS = 300_000  # of a table, some 60 MB; a full one is begun anew
MOST_CHARACTERS = 4_000_000
ENOUGH_WORDS = 20_000  # of a table from which on its new words are judged
NEW_SHARE = 0.4  # of a text's characters in new words: beyond it the library is faster
FEW_ROWS = 0.2  # of a batch that the table has or learns: below it the next batches are left to the library
LONG_NUMBER = 4  # characters, a space among them
TOGETHER = 100  # new words in one text for the library
BETWEEN = "\ufdd0"  # in no word
PAUSE = 15  # batches left to the library after one of mostly new words


class WordTable:
    """Ids by word, for texts in normal form.

    Threads may share one: a table that is full is replaced, never emptied.
    """

    def __init__(self, words: Any, pattern: str, marked: Mapping[str, int], lengths: np.ndarray) -> None:
        """Args:
        words: a `tokenizers` tokenizer of texts of words, `BETWEEN` them.
        pattern: finds the words of a text, for `re`.
        marked: control tokens as they are marked, by their text, with their ids.
        lengths: UTF-8 bytes of each token's text by id [vocabulary].
        """
        self.words, self.lengths = words, lengths
        self.find = re.compile(pattern).findall
        self.fixed = {token: np.int32(token_id).tobytes() for token, token_id in marked.items()}
        self.table = dict(self.fixed)
        self.characters = 0
        self.pause = 0

    def encode(self, texts: Sequence[str]) -> list[bytes | None]:
        """The ids of each text as int32 in memory order; None for a text that is the library's.

        The ids of a text with a character outside the alphabet lack those of that character: compare their bytes.
        """
        if self.pause:
            self.pause -= 1
            return [None] * len(texts)
        table = self.table
        known = table.__getitem__
        found: list[bytes | None] = []
        late: list[tuple[int, list[str]]] = []
        new: set[str] = set()
        for text in texts:
            words = self.find(text)
            try:
                found.append(b"".join(map(known, words)))
            except KeyError:
                missing = set(words).difference(table)
                # some new words are learnt; where they are most of a text, the library is faster
                if sum(map(len, missing)) <= NEW_SHARE * len(text) or len(table) < ENOUGH_WORDS:
                    late.append((len(found), words))
                    new |= missing
                found.append(None)
        if len(texts) - found.count(None) + len(late) < FEW_ROWS * len(texts):
            self.pause = PAUSE
        if late and (learnt := self._ids_of(list(new))):
            table.update(learnt)
            for number, words in late:
                with suppress(KeyError):  # another thread has just let go of one of the words
                    found[number] = b"".join(map(known, words))
            self._keep(table, learnt)
        return found

    def _keep(self, table: dict[str, bytes], learnt: Mapping[str, bytes]) -> None:
        """Keep the words; long numbers hardly ever return, and would fill a table."""
        for word in learnt:
            if len(word) > LONG_NUMBER and word[-1].isdigit():
                table.pop(word, None)
            else:
                self.characters += len(word)
        if len(table) > MOST_WORDS or self.characters > MOST_CHARACTERS:
            self.table, self.characters = dict(self.fixed), 0

    def _ids_of(self, new: list[str]) -> dict[str, bytes]:
        """The ids of words by the library; empty where they cannot be told from one another."""
        joined = [BETWEEN.join(new[at : at + TOGETHER]) for at in range(0, len(new), TOGETHER)]
        rows = [row.ids for row in self.words.encode_batch_fast(joined, add_special_tokens=False)]
        ids = np.concatenate([np.fromiter(row, np.int32, len(row)) for row in rows])
        places = np.cumsum(self.lengths[ids])
        ends = np.cumsum([len(word.encode()) for word in new])
        last = np.searchsorted(places, ends)
        if last[-1] >= len(places) or (places[last] != ends).any():
            return {}  # a word has a byte the vocabulary lacks
        content, edges = ids.tobytes(), [0, *(4 * (last + 1)).tolist()]
        return {word: content[edges[n] : edges[n + 1]] for n, word in enumerate(new)}


def word_table(tokenizer: Any, marks: str, marked: Mapping[str, int], lengths: np.ndarray) -> WordTable | None:
    """The table of a `tokenizers` tokenizer; None when it does not divide texts into words in a way known here.

    Args:
        tokenizer: without normaliser; its added tokens are `marked`, and none of them takes white space around it.
        marks: a pattern for any of them.
        lengths: UTF-8 bytes of each token's text by id [vocabulary].
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    source = pattern_of(tokenizer)
    if source is None or not isinstance(tokenizer.model, models.BPE) or tokenizer.model.dropout:
        return None
    try:
        pattern = explicit(source)
    except Untranslatable:
        return None
    if not _agree(tokenizer, re.compile(pattern)):
        return None
    words = Tokenizer(tokenizer.model)
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(BETWEEN, "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return WordTable(words, f"{pattern}|{marks}", marked, lengths)


def pattern_of(tokenizer: Any) -> str | None:
    """The expression by which a tokenizer finds words; None when it goes about it in another way."""
    if tokenizer.pre_tokenizer is None:
        return None
    state = json.loads(tokenizer.pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    *before, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not before:
        return BYTE_LEVEL_PATTERN if last["use_regex"] else None
    plain = len(before) == 1 and before[0]["type"] == "Split" and not last["use_regex"]
    if not plain or before[0]["behavior"] != "Isolated" or before[0]["invert"]:
        return None
    return before[0]["pattern"].get("Regex")


def _agree(tokenizer: Any, pattern: re.Pattern[str]) -> bool:
    """Whether the library divides all characters of the alphabet as the pattern does.

    Its tables of Unicode are its own: this is where a difference in version would show.
    """
    runs = [(first, first + 8 if first in WHOLE else last) for first, last, _ in alphabet()]
    text = "".join(chr(code) for first, last in runs for code in range(first, last + 1))
    # each character by itself, too: after a letter and before a line break
    text += "".join(f"a{chr(code)}\n" for first, last in runs for code in (first, last))
    at, places = 0, []
    for word in pattern.findall(text):
        places.append((at, at + len(word)))
        at += len(word)
    return [place for _, place in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == places
