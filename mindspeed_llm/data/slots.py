"""Slot by slot: every slot of every message is tokenised on its own, as upstream does it (`--compat upstream`).

No merge of the tokenizer crosses a slot, and control tokens are tokens wherever they stand.
"""

from collections.abc import Callable, Iterable, Sequence

from mindspeed_llm.data.layout import Blocks, Slot, Turn
from mindspeed_llm.data.tokenizer import Tokenizer
from mindspeed_llm.data.upstream import fill
from mindspeed_llm.data.whole_text import Laid


class SlotEncoder:
    """Turns to token ids, slot by slot."""

    def __init__(self, tokenizer: Tokenizer, special: Callable[[str], list[int]]) -> None:
        """Args: special: ids of a `Special` slot by its name."""
        self.tokenizer = tokenizer
        self.special = special

    def tokenize(self, rows: Sequence[Sequence[Turn]]) -> list[Laid]:
        """The rows as tokens; each distinct text goes through the tokenizer once, all in one batch."""
        filled = [[(_filled(source), _filled(target)) for source, target in row] for row in rows]
        texts = {slot for row in filled for turn in row for side in turn for slot in side if isinstance(slot, str)}
        ordered = list(texts)
        table = dict(zip(ordered, self.tokenizer.encode_batch(ordered), strict=True))
        laid_out = []
        for row in filled:
            laid = Laid([], [])
            for source, target in row:
                laid.ids += self._ids(source, table)
                start = len(laid.ids)
                laid.ids += self._ids(target, table)
                laid.spans.append((start, len(laid.ids)))
            laid_out.append(laid)
        return laid_out

    def _ids(self, slots: Iterable[Slot], table: dict[str, list[int]]) -> list[int]:
        ids: list[int] = []
        for slot in slots:
            ids += table[slot] if isinstance(slot, str) else self.special(slot.name)
        return ids


def _filled(blocks: Blocks) -> list[Slot]:
    return [slot for block in blocks for slot in fill(block) if slot != ""]
