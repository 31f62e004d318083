"""Elements of weights and adapters that a rank holds, counted from the weight table.

Equal layers are counted once, and experts of a layer together, so that hundreds of layouts are compared in seconds.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.checkpoint.tables import EMBEDDING, Entry, WeightTable
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families.base import Kind

COLUMNS = (Kind.COLUMN, Kind.QKV, Kind.GATED, Kind.VOCAB)


class Piece(NamedTuple):
    """One kind of tensor of a layer.

    Attributes:
        rows, columns: whole; columns are 1 for vectors.
        cut: ranks hold parts of it. of_expert: every expert has one. adapter: of a LoRA adapter.
        vocabulary: its rows are those of the vocabulary. trained: it has a gradient.
    """

    rows: int
    columns: int
    cut: bool
    of_expert: bool = False
    adapter: bool = False
    vocabulary: bool = False
    trained: bool = True

    def elements(self, layout: Layout) -> int:
        """Of one tensor on a rank that holds it; a vocabulary is rounded up to a multiple of TP."""
        parts = (layout.etp if self.of_expert else layout.tp) if self.cut else 1
        if self.vocabulary:
            return -(-self.rows // parts) * self.columns
        return self.rows * self.columns // parts


Pieces = Counter[Piece]
"""Piece -> how many of it, over all experts."""


@dataclass(frozen=True)
class Held:
    """What a rank holds of some pieces, in elements.

    Attributes:
        dense, expert: of dense layers and of experts, which are replicated over different ranks.
        largest: of one tensor.
    """

    dense: int = 0
    expert: int = 0
    largest: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.dense + self.expert


def piece(entry: Entry, settings: LoraSettings | None) -> Piece:
    """The piece an entry of the table is; beside an adapter it is trained only where it is to be trained whole."""
    rows, columns = (*entry.shape, 1)[:2]
    cut, vocabulary = entry.kind is not Kind.REPLICATED, entry.kind is Kind.VOCAB
    trained = settings is None or (entry.name.endswith(".weight") and settings.saves(entry.name[: -len(".weight")]))
    return Piece(rows, columns, cut, entry.expert is not None, vocabulary=vocabulary, trained=trained)


def factors(entry: Entry, settings: LoraSettings) -> list[Piece]:
    """What an adapter has for a table's weight [o, i]; nothing where it is not adapted.

    A [r, i] and B [o, r]; with DoRA a length for each row; with PiSSA the factors it started from, which are kept.
    """
    module = entry.name.removesuffix(".weight")
    if not entry.name.endswith(".weight") or len(entry.shape) != 2 or not settings.adapts(module):
        return []
    rank, (rows, columns), of_expert = settings.rank(module), entry.shape, entry.expert is not None
    vocabulary, by_rows = entry.kind is Kind.VOCAB, entry.kind in COLUMNS
    found = [
        Piece(rank, columns, entry.kind is Kind.ROW, of_expert, adapter=True),
        Piece(rows, rank, by_rows, of_expert, adapter=True, vocabulary=vocabulary),
    ]
    if settings.init != "default":
        found += [one._replace(trained=False) for one in found]
    if settings.use_dora:
        found.append(Piece(rows, 1, by_rows, of_expert, adapter=True, vocabulary=vocabulary))
    return found


class ModelWeights:
    """The pieces of every layer of a model, and of its adapter."""

    def __init__(self, model: ModelConfig, settings: LoraSettings | None) -> None:
        """Read the model's table. settings: of the adapter; None for full tuning."""
        self.model, self.settings = model, settings
        self.table = WeightTable(model)
        self.stages: dict[tuple[Any, int], Pieces] = {}

    @cached_property
    def layers(self) -> list[Pieces]:
        """By global layer number; prediction layers, which are not trained, are left out."""
        known: dict[tuple[tuple[Piece, int], ...], Pieces] = {}
        found = []
        for layer in range(self.model.num_layers):
            counted = self._counted(self.table.of_layer[layer])
            found.append(known.setdefault(tuple(counted.items()), counted))
        return found

    @cached_property
    def embedding(self) -> Pieces:
        """The table of token embeddings."""
        return self._counted([self.table.entries[EMBEDDING]])

    @cached_property
    def output(self) -> Pieces:
        """The final norm, and the output layer where it is not the embedding's."""
        return self._counted([one for one in self.table.of_layer[None] if one.name != EMBEDDING])

    def _counted(self, entries: Iterable[Entry]) -> Pieces:
        counted: Pieces = Counter()
        for entry in entries:
            counted[piece(entry, self.settings)] += 1
            if self.settings is not None:
                counted.update(factors(entry, self.settings))
        return counted

    def stage(self, layout: Layout, pp_rank: int) -> Pieces:
        """All pieces of a pipeline stage; a tied output layer on another stage than the embedding is a copy of it."""
        key = layout.chunks, pp_rank
        if key not in self.stages:
            self.stages[key] = self._stage(layout, pp_rank)
        return self.stages[key]

    def _stage(self, layout: Layout, pp_rank: int) -> Pieces:
        total: Pieces = Counter()
        first = last = False
        for vp_rank in range(layout.vp):
            first, last = first or layout.is_first(pp_rank, vp_rank), last or layout.is_last(pp_rank, vp_rank)
            for layer in layout.slots(pp_rank, vp_rank):
                if layer is not None:
                    total.update(self.layers[layer])
        if first or (last and self.model.tie_word_embeddings):
            total.update(self.embedding)
        if last:
            total.update(self.output)
        return total


def held(pieces: Pieces, layout: Layout, adapter: bool, trained_only: bool = False) -> Held:
    """What a rank holds of weights, or of an adapter: of all, or of what is trained."""
    dense = expert = largest = 0
    for one, count in pieces.items():
        if one.adapter is not adapter or (trained_only and not one.trained):
            continue
        elements = one.elements(layout)
        largest = max(largest, elements)
        if one.of_expert:
            expert += elements * count // layout.ep
        else:
            dense += elements * count
    return Held(dense, expert, largest)
