"""Weight tables with one wrong row, and what the live network then says. Imports megatron-core."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy
import torch

from mindspeed_llm import device
from mindspeed_llm.checkpoint import tables
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.lazy import narrow
from mindspeed_llm.checkpoint.live import live_tensors, load_live
from mindspeed_llm.errors import InputError
from mindspeed_llm.models import parallel
from mindspeed_llm.models.causal_lm import CausalLM
from mindspeed_llm.models.families import family
from mindspeed_llm.models.families.base import Join, Weight
from mindspeed_llm.models.gpt import EngineOptions, build_chunks


class Moved:
    """A source in which the rows of one table row's tensors are in another order."""

    def __init__(self, source: HFSource, row: Weight) -> None:
        self.source, self.row = source, row
        self.path, self.config, self.table = source.path, source.config, source.table

    def names(self) -> list[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def read(self, name: str, rows: list | None = None, columns: list | None = None) -> torch.Tensor:
        """Gate and up swapped, q, k and v of neighbouring groups mixed up, or the rows moved by one."""
        values = self.source.read(name)
        if self.table.entry(name).row is self.row:
            gated = self.row.joined in (Join.GATED, Join.INTERLEAVED)
            step = values.shape[0] // 2 if gated else self.config.kv_channels if self.row.joined is Join.QKV else 1
            values = values.roll(step, 0) if values.shape[0] > 1 else values.roll(1, 1)
        return narrow(values, rows, columns)


@contextmanager
def without(row: Weight) -> Iterator[None]:
    """Every table lacks this row."""

    def cut(name: str) -> object:
        one = family(name)
        return dataclasses.replace(one, weights=tuple(other for other in one.weights if other is not row))

    with patch.object(tables, "family", cut):
        yield


def is_refused(folder: Path, row: Weight) -> bool:
    """Whether the folder cannot be opened by a table without the row."""
    with without(row):
        try:
            HFSource(folder)
        except (InputError, StopIteration):
            return True
    return False


def differences(rank: int, folder: Path, ids: numpy.ndarray) -> dict[str, tuple[float, bool]]:
    """For each row of the folder's table: how far its disorder moves the logits, and whether its lack is refused."""
    chosen, options = device.select("cpu"), EngineOptions()
    parallel.start(chosen, 1, 1)
    try:
        source = HFSource(folder)
        (chunk,) = build_chunks(source.config, options, chosen)
        before = logits(chunk, source, ids)
        found = {}
        for row in dict.fromkeys(entry.row for entry in source.table.entries.values()):
            if "{mtp}" not in row.name:
                moved = float((logits(chunk, Moved(source, row), ids) - before).abs().max())
                found[row.name] = moved, is_refused(folder, row)
        return found
    finally:
        parallel.stop()


@torch.no_grad()
def logits(chunk: CausalLM, source: HFSource | Moved, ids: numpy.ndarray) -> torch.Tensor:
    """The network's logits with the weights of `source`."""
    load_live(live_tensors(chunk), source)
    chunk.eval()
    return chunk(torch.from_numpy(ids), None, None).clone()
