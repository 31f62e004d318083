"""How long a step waits for its rows, and what drawing the order of an epoch costs: `python benchmarks/feed.py`.

Rows have the lengths of Alpaca; a step is matrix products of a fixed time, which let other threads run, as a real one.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mindspeed_llm import device
from mindspeed_llm.arguments.data import DataOptions
from mindspeed_llm.data.dataset import IndexedDataset, RowSource
from mindspeed_llm.data.index_cache import IndexCache
from mindspeed_llm.data.indexed_file import IndexedFileWriter
from mindspeed_llm.data.sampler import EpochSampler, LengthGroupedSampler

ROWS, MICRO_BATCH, MICRO_BATCHES, STEPS = 52_000, 4, 8, 40


class Slow:
    """Rows that come late, as from a network file system."""

    def __init__(self, source: RowSource, seconds: float) -> None:
        self.source, self.seconds, self.lengths = source, seconds, source.lengths

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        time.sleep(self.seconds)
        return self.source[row]


def make_rows(folder: Path) -> IndexedDataset:
    """Prepared files of random tokens."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(4.6, 0.9, ROWS).astype(int), 8, 4096)
    for field in ("input_ids", "labels"):
        with IndexedFileWriter(folder / f"x_packed_{field}_document") as writer:
            writer.add(random.integers(0, 30_000, int(lengths.sum())).astype(np.int32), lengths.tolist())
    return IndexedDataset(folder / "x")


def waiting(source: RowSource, options: DataOptions, threads: int, step: float) -> str:
    """Median and longest wait of a step, in milliseconds."""
    from mindspeed_llm.training.feed import Feed, collate_of

    sampler = EpochSampler(len(source), MICRO_BATCH, 0, 2, MICRO_BATCHES, seed=1)
    feed = Feed(source, sampler, collate_of(options, 0, 8), torch.device("cpu"), threads)
    feed.batches(0)
    waits, work = [], torch.rand(700, 700)
    for number in range(1, STEPS + 1):
        end = time.perf_counter() + step
        while time.perf_counter() < end:
            work = work @ work * 1e-3
        begin = time.perf_counter()
        feed.batches(number * sampler.global_batch_size)
        waits.append(1000 * (time.perf_counter() - begin))
    feed.close()
    return f"median {np.median(waits):.1f} ms, longest {max(waits):.1f} ms"


def drawing(rows: int) -> str:
    """Milliseconds to draw an epoch's order, to keep it, and to map it."""
    lengths = np.random.default_rng(0).integers(10, 2000, rows).astype(np.int32)
    seconds = [time.perf_counter()]
    order = EpochSampler(rows, 4, 0, 2, 4, seed=1)._draw_order(0)
    seconds.append(time.perf_counter())
    LengthGroupedSampler(lengths, 4, 0, 2, 4, seed=1)._draw_order(0)
    seconds.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        IndexCache(folder, True).array({"rows": rows}, lambda: order)
        seconds.append(time.perf_counter())
        IndexCache(folder, False).array({"rows": rows}, lambda: order)
        seconds.append(time.perf_counter())
    shuffled, grouped, kept, mapped = 1000 * np.diff(seconds)
    return f"shuffled {shuffled:.0f} ms, grouped {grouped:.0f} ms, kept {kept:.0f} ms, mapped {mapped:.1f} ms"


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", type=float, default=0.1, help="seconds a step computes")
    step = parser.parse_args().step
    device.select("cpu")
    layouts = {"padded to the longest row": {"no_pad_to_seq_lengths": True}, "padding-free": {"padding_free": True}}
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(Path(folder))
        for threads in (0, 1, 2):
            for name, flags in layouts.items():
                print(f"{threads} threads, {name}: {waiting(rows, DataOptions(**flags), threads, step)}", flush=True)
            late = waiting(Slow(rows, 0.002), DataOptions(no_pad_to_seq_lengths=True), threads, step)
            print(f"{threads} threads, 2 ms a row: {late}", flush=True)
    for count in (1_000_000, 4_000_000, 16_000_000):
        print(f"order of {count:,} rows: {drawing(count)}", flush=True)


if __name__ == "__main__":
    main()
