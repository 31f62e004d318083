"""Tokens of turns that their handler lays out itself, without a template."""

from collections.abc import Iterable

from mindspeed_llm.data.messages import PlainPiece, PlainTurns
from mindspeed_llm.data.tokenizer import Tokenizer

Row = tuple[list[int], list[tuple[int, int]], list[int]]  # ids, trained spans, positions labelled end-of-text


def plain_row(row: PlainTurns, tokenizer: Tokenizer, eos_id: int) -> Row:
    """Ids and trained spans of a row, and the positions whose label is end-of-text."""
    ids, spans = _whole(row, tokenizer) if row.whole else _piecewise(row, tokenizer)
    openings = [0, *(stop for _, stop in spans[:-1])] if row.eos_opens_turns and ids else []
    if row.ends_with_eos:
        spans.append((len(ids), len(ids) + 1))
        ids.append(eos_id)
    return ids, spans, openings


def _whole(row: PlainTurns, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """The text of all turns at once; as many tokens as the text before the last target has alone are not trained."""
    texts = [str(piece) for source, target in row.turns for piece in (*source, *target)]
    last = [str(piece) for piece in row.turns[-1][1]]
    before = "".join(texts[: len(texts) - len(last)])
    whole, prompt = tokenizer.encode_batch(["".join(texts), before])
    return whole, [(min(len(prompt), len(whole)), len(whole))]


def _piecewise(row: PlainTurns, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for source, target in row.turns:
        ids += _ids(source, tokenizer)
        start = len(ids)
        ids += _ids(target, tokenizer)
        spans.append((start, len(ids)))
    return ids, spans


def _ids(pieces: Iterable[PlainPiece], tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = []
    for piece in pieces:
        ids += [piece] if isinstance(piece, int) else tokenizer.encode(piece)
    return ids
