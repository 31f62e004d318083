"""Tokens of turns that their handler lays out itself, without a template."""

from collections.abc import Callable, Iterable, Sequence

from mindspeed_llm.data.layout import ANSWER, CONTENT, TEXT, Block, Turn
from mindspeed_llm.data.messages import PlainPiece, PlainTurns

Row = tuple[list[int], list[tuple[int, int]], list[int]]  # ids, trained spans, positions labelled end-of-text
Encode = Callable[[Sequence[str]], list[list[int]]]


def as_turns(row: PlainTurns) -> list[Turn]:
    """The turns of a row whose text is tokenised as one: what the handler writes is text like the user's."""
    return [
        (
            [Block(CONTENT, (("".join(map(str, source)), TEXT),))],
            [Block(CONTENT, (("".join(map(str, target)), ANSWER),))],
        )
        for source, target in row.turns
    ]


def plain_row(row: PlainTurns, encode: Encode, eos_id: int) -> Row:
    """Ids and trained spans of a row by upstream's rules, and the positions whose label is end-of-text; rows whose
    text is tokenised as one come here under `compat` only."""
    ids, spans = _whole(row, encode) if row.whole else _piecewise(row, encode)
    openings = [0, *(stop for _, stop in spans[:-1])] if row.eos_opens_turns and ids else []
    if row.ends_with_eos:
        spans.append((len(ids), len(ids) + 1))
        ids.append(eos_id)
    return ids, spans, openings


def _whole(row: PlainTurns, encode: Encode) -> tuple[list[int], list[tuple[int, int]]]:
    """The text of all turns at once; as many tokens as the text before the last target has alone are not trained."""
    texts = [str(piece) for source, target in row.turns for piece in (*source, *target)]
    last = [str(piece) for piece in row.turns[-1][1]]
    before = "".join(texts[: len(texts) - len(last)])
    whole, prompt = encode(["".join(texts), before])
    return whole, [(min(len(prompt), len(whole)), len(whole))]


def _piecewise(row: PlainTurns, encode: Encode) -> tuple[list[int], list[tuple[int, int]]]:
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for source, target in row.turns:
        ids += _ids(source, encode)
        start = len(ids)
        ids += _ids(target, encode)
        spans.append((start, len(ids)))
    return ids, spans


def _ids(pieces: Iterable[PlainPiece], encode: Encode) -> list[int]:
    ids: list[int] = []
    for piece in pieces:
        ids += [piece] if isinstance(piece, int) else encode([piece])[0]
    return ids
