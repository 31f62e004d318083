"""What of a tokenised row is kept and trained: cutting at a length, history and prompt in or out of the loss.

These rules work on tokens alone and are the same for every template: they come after the conversation has become
tokens, and before labels are written.
"""

from dataclasses import dataclass, replace

from mindspeed_llm.data.encode import Encoded

STRATEGIES = ("delete", "left", "right")
Span = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """What is asked of every row.

    Attributes:
        max_length: longest row in tokens, None for no limit.
        strategy: what becomes of a longer one: `delete` leaves it out, `left` cuts its beginning off, `right` its end.
        mask_history: only the last answer is trained.
        train_on_prompt: every token is trained, prompts too.
    """

    max_length: int | None = None
    strategy: str = "delete"
    mask_history: bool = False
    train_on_prompt: bool = False

    def apply(self, row: Encoded) -> Encoded | None:
        """The row as it is kept; None when it is to be left out for its length."""
        if self.mask_history:
            row = replace(row, spans=last_answer(row.spans), eos_at=[])
        if self.train_on_prompt:
            row = replace(row, spans=[(0, len(row.ids))], eos_at=[])
        if self.max_length is None or len(row.ids) <= self.max_length:
            return row
        if self.strategy == "delete":
            return None
        begin = len(row.ids) - self.max_length if self.strategy == "left" else 0
        return window(row, begin, begin + self.max_length)


def last_answer(spans: list[Span]) -> list[Span]:
    """The spans of the last trained answer: the last one that is not empty, and those that touch it."""
    kept: list[Span] = []
    for start, stop in reversed(spans):
        if stop <= start:
            continue
        if kept and stop != kept[0][0]:
            break
        kept.insert(0, (start, stop))
    return kept


def window(row: Encoded, begin: int, end: int) -> Encoded:
    """The tokens `begin` to `end` of a row, its trained spans moved with them."""
    spans = [(max(start, begin) - begin, min(stop, end) - begin) for start, stop in row.spans]
    return replace(
        row,
        ids=row.ids[begin:end],
        spans=[(start, stop) for start, stop in spans if stop > start],
        eos_at=[position - begin for position in row.eos_at if begin <= position < end],
    )
