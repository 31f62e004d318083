"""Tokenising by a table of the words met so far: several times faster than the tokenizer library, with the same ids.

A byte-level BPE tokenizer divides a text into words by a regular expression, and the ids of a word depend on nothing
but the word. Most words of a text have come before. So words are found by `re` (see `split_pattern`), their ids are
looked up, and only new ones go through the library. What a table cannot do exactly it leaves to the library: texts with
characters outside its alphabet, and texts of mostly new words, such as Chinese ones, whose words are whole clauses.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mindspeed_llm.data.split_pattern import WHOLE, Untranslatable, alphabet, explicit

# the expression of tokenizers whose ByteLevel step divides the text itself: GPT-2's
BYTE_LEVEL_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MOST_WORDS = 120_000  # of a table, some 25 MB; a full one is begun anew
MOST_CHARACTERS = 1_500_000
NEW_SHARE = 0.3  # of the characters in new words: beyond it the library is faster
PAUSE = 15  # batches left to the library after one of mostly new words


class WordTable:
    """Ids by word, for texts in normal form.

    Threads may share one: a table that is full is replaced, never emptied.
    """

    def __init__(self, words: Any, pattern: str, marked: Mapping[str, int]) -> None:
        """Args:
        words: a `tokenizers` tokenizer that takes each text for one word.
        pattern: finds the words of a text, for `re`.
        marked: control tokens as they are marked, by their text, with their ids.
        """
        self.words = words
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
        for text in texts:
            words = self.find(text)
            try:
                found.append(b"".join(map(known, words)))
            except KeyError:
                late.append((len(found), words))
                found.append(None)
        if late and self._learn(table, {word for _, words in late for word in words}, sum(map(len, texts))):
            for number, words in late:
                found[number] = b"".join(map(known, words))
        return found

    def _learn(self, table: dict[str, bytes], words: set[str], characters: int) -> bool:
        """Put words into a table, unless they are too many of all the characters for that to pay."""
        new = list(words.difference(table))
        size = sum(map(len, new))
        if size > NEW_SHARE * characters and len(table) > len(self.fixed):
            self.pause = PAUSE
            return False
        encoded = self.words.encode_batch_fast(new, add_special_tokens=False)
        table.update(
            (word, np.fromiter(ids, np.int32, len(ids)).tobytes())
            for word, ids in zip(new, (row.ids for row in encoded), strict=True)
        )
        self.characters += size
        if len(table) > MOST_WORDS or self.characters > MOST_CHARACTERS:
            self.table, self.characters = dict(self.fixed), 0
        return True


def word_table(tokenizer: Any, marks: str, marked: Mapping[str, int]) -> WordTable | None:
    """The table of a `tokenizers` tokenizer; None when it does not divide texts into words in a way known here.

    Args:
        tokenizer: without normaliser; its added tokens are `marked`, and none of them takes white space around it.
        marks: a pattern for any of them.
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
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return WordTable(words, f"{pattern}|{marks}", marked)


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
