"""A tokenizer's regular expression for dividing text into words, in the form that Python's `re` takes.

The patterns of tokenizer.json are written for Oniguruma: they name Unicode categories (`\\p{L}`), which `re` does not
know. Here every category becomes the list of its characters, within an alphabet of blocks whose characters have had
their categories for many versions of Unicode. A character outside that alphabet is in no class, negated ones included:
it is left over, so that a text with one is known by the length of its words.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache

# Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic; punctuation to dingbats; kana, ideographs, Hangul; wide forms; emoji
BLOCKS = (
    (0x0000, 0x024F), (0x0370, 0x052F), (0x0531, 0x0556), (0x0561, 0x0587), (0x05D0, 0x05EA), (0x0620, 0x064A),
    (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x20A0, 0x20B5), (0x2100, 0x218F), (0x2190, 0x23E8), (0x2460, 0x27BF),
    (0x3000, 0x30FF), (0x3400, 0x4DB5), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xFE0F, 0xFE0F), (0xFF01, 0xFFE6),
    (0x1F300, 0x1F320), (0x1F330, 0x1F37C), (0x1F400, 0x1F4FC), (0x1F5FB, 0x1F640), (0x1F680, 0x1F6C5),
)  # fmt: skip
WHOLE = (0x3400, 0x4E00, 0xAC00)  # blocks of letters without case (Lo) throughout
# letters that are equal to ASCII ones when case is ignored
FOLDED = "\u0130\u0131\u017f\u212a"
WHITE = frozenset("\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
                  "\u2028\u2029\u202f\u205f\u3000")  # fmt: skip
LITERAL_ESCAPES = {"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v"}
TOKEN = re.compile(
    r"\\[pP]\{\^?[A-Z][a-z]?\}|\\.|\[(?:\\[pP]\{\^?[A-Z][a-z]?\}|\\.|[^\]\\])+\]|\(\?i:|\(\?:|\(\?!|\(\?=|\{\d+(?:,\d*)?\}|.",
    re.DOTALL,
)
MEMBER = re.compile(r"\\[pP]\{\^?[A-Z][a-z]?\}|\\.|.", re.DOTALL)
Ranges = list[tuple[int, int]]


class Untranslatable(Exception):
    """A pattern uses what has no known equal in `re`."""


@lru_cache(maxsize=1)
def alphabet() -> tuple[tuple[int, int, str], ...]:
    """(first, last, category) of the runs of characters with one category, in order.

    Unassigned, control and format characters are left out: not every pattern has a place for them.
    """
    runs: list[tuple[int, int, str]] = []
    for first, last in BLOCKS:
        if first in WHOLE:
            runs.append((first, last, "Lo"))
            continue
        for code in range(first, last + 1):
            category = unicodedata.category(chr(code))
            if (category[0] == "C" and chr(code) not in WHITE) or chr(code) in FOLDED:
                continue
            if runs and runs[-1][1] == code - 1 and runs[-1][2] == category:
                runs[-1] = (runs[-1][0], code, category)
            else:
                runs.append((code, code, category))
    return tuple(runs)


def explicit(pattern: str) -> str:
    """The pattern with its classes written out.

    Raises:
        Untranslatable: it holds something of which it is not known to mean the same in `re`.
    """
    written: list[str] = []
    folds: list[bool] = []  # of each open group, whether case is ignored within
    for token in TOKEN.findall(pattern):
        if token.startswith("("):
            folds.append(token == "(?i:" or bool(folds and folds[-1]))
            written.append("(?:" if token == "(" else token)
        elif token == ")":
            if not folds:
                raise Untranslatable("a group is closed that was not opened")
            folds.pop()
            written.append(token)
        elif token == "?" and written and written[-1] == "(?:":
            raise Untranslatable("a group of a kind that is not known here")
        elif token in "|?*+" or token.startswith("{"):
            written.append(token)
        elif token in (".", "^", "$", "]", "}"):
            raise Untranslatable(token)
        elif len(token) == 1 or (token[0] == "\\" and len(token) == 2 and token[1] not in "sSdD"):
            written.append(re.escape(_literal(token)))
        elif folds and folds[-1]:
            raise Untranslatable(f"{token} where case is ignored")
        else:
            written.append(_class(_ranges(token)))
    if folds:
        raise Untranslatable("a group is not closed")
    return "".join(written)


def _literal(token: str) -> str:
    """The character that a token stands for."""
    character = token
    if token[0] == "\\":
        character = LITERAL_ESCAPES.get(token[1], token[1])
        if token[1].isalnum() and token[1] not in LITERAL_ESCAPES:
            raise Untranslatable(token)
    if not any(first <= ord(character) <= last for first, last, _ in alphabet()):
        raise Untranslatable(repr(character))
    return character


def _ranges(token: str) -> Ranges:
    """The characters of a class, in order."""
    if token[0] != "[":
        return [(first, last) for first, last, category in _pieces() if _has(token, first, category)]
    body = token[1:-1]
    negated = body.startswith("^")
    members = MEMBER.findall(body[1:] if negated else body)
    if "[" in members or "&&" in body:
        raise Untranslatable(token)
    tests: list[str | tuple[int, int]] = []
    at = 0
    while at < len(members):
        if len(members[at]) > 1 and members[at][1] in "pPsSdD":
            tests.append(members[at])
            at += 1
        elif members[at + 1 : at + 2] == ["-"] and at + 2 < len(members):
            tests.append((ord(_literal(members[at])), ord(_literal(members[at + 2]))))
            at += 3
        else:
            tests.append((ord(_literal(members[at])),) * 2)
            at += 1
    edges = [test for test in tests if isinstance(test, tuple)]
    return [
        (first, last)
        for first, last, category in _pieces(edges)
        if any(
            test[0] <= first <= test[1] if isinstance(test, tuple) else _has(test, first, category) for test in tests
        )
        != negated
    ]


def _pieces(edges: Sequence[tuple[int, int]] = ()) -> Iterator[tuple[int, int, str]]:
    """The alphabet's runs, divided so that white space and each of `edges` is a run of its own."""
    cuts = sorted({cut for first, last in [*((ord(c), ord(c)) for c in WHITE), *edges] for cut in (first, last + 1)})
    for first, last, category in alphabet():
        inside = cuts[bisect_right(cuts, first) : bisect_right(cuts, last)]
        for begin, end in zip([first, *inside], [*inside, last + 1], strict=True):
            yield begin, end - 1, category


def _has(escape: str, character: int, category: str) -> bool:
    """Whether a character of a category is in the class of an escape."""
    kind = escape[1]
    if kind in "sS":
        return (chr(character) in WHITE) == (kind == "s")
    if kind in "dD":
        return (category == "Nd") == (kind == "d")
    name = escape[3:-1]
    within = category.startswith(name.removeprefix("^"))
    return within == ((kind == "p") != name.startswith("^"))


def _class(ranges: Ranges) -> str:
    """The class of these characters for `re`; one that nothing matches when there are none."""
    merged: Ranges = []
    for first, last in ranges:
        if merged and merged[-1][1] == first - 1:
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    if not merged:
        return "(?!)"
    return "[" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in merged) + "]"
