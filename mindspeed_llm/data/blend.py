"""Several data sets in stated shares: `--data-path 0.3 first 0.7 second`."""

from collections.abc import Sequence

import numpy as np

from mindspeed_llm.data.dataset import RowSource, Sample
from mindspeed_llm.errors import InputError, UsageError


def parse_data_path(words: Sequence[str]) -> tuple[list[float], list[str]]:
    """(weights, prefixes) of `--data-path`: prefixes alone, or a weight before each of them.

    The weights are empty where none are given, and else sum to one.

    Raises:
        UsageError: weights before some prefixes only, or one that is not above zero.
    """
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        return [], list(words)
    given = " ".join(words)
    if len(words) % 2 or any(n is None for n in numbers[0::2]) or any(n is not None for n in numbers[1::2]):
        raise UsageError(f"--data-path {given}: give a weight before every prefix, such as 0.3 FIRST 0.7 SECOND")
    weights = [number for number in numbers[0::2] if number is not None]
    if min(weights) <= 0 or not np.isfinite(weights).all():
        raise UsageError(f"--data-path {given}: weights must be above 0")
    return [weight / sum(weights) for weight in weights], list(words[1::2])


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


class BlendedDataset:
    """Rows of several sources, as many of each as its weight says.

    One pass through the blend has as many rows as the sources have together. A source that has fewer rows than its
    share comes in whole passes and a drawn part of another; one that has more, in a drawn part. `passes` draws other
    rows for the next pass, so that nothing of a large source is left out for good.

    Attributes:
        counts: [sources] int64, rows of each in one pass.
        lengths: [rows] int32, tokens of each row.
    """

    def __init__(self, sources: Sequence[RowSource], weights: Sequence[float], seed: int, passes: int = 0) -> None:
        """Args: weights: one above zero per source; passes: number of the pass, from 0.

        Raises:
            InputError: a source has no rows.
            UsageError: not one weight per source.
        """
        if len(sources) != len(weights) or any(weight <= 0 for weight in weights):
            raise UsageError(f"{len(sources)} data sets are blended with the weights {list(weights)}; one above 0 each")
        empty = [number for number, source in enumerate(sources) if not len(source)]
        if empty:
            raise InputError(f"data set {empty[0] + 1} of the blend holds no rows")
        self.sources = list(sources)
        self.counts = shares_of(sum(len(source) for source in sources), weights)
        drawn = [
            _draw(len(source), count, np.random.default_rng([seed, passes, number]))
            for number, (source, count) in enumerate(zip(sources, self.counts.tolist(), strict=True))
        ]
        self.part = np.repeat(np.arange(len(sources), dtype=np.int16), self.counts)
        self.row = np.concatenate(drawn)
        lengths = [np.asarray(source.lengths)[rows] for source, rows in zip(sources, drawn, strict=True)]
        self.lengths = np.concatenate(lengths)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, row: int) -> Sample:
        """Row `row` of the blend."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.sources[int(self.part[row])][int(self.row[row])]


def shares_of(total: int, weights: Sequence[float]) -> np.ndarray:
    """[weights] int64 that sum to `total`, each within one of its share and at least one."""
    exact = np.asarray(weights, float) / sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    # the largest remainders get what flooring left over
    for part in np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]:
        counts[part] += 1
    for part in np.flatnonzero(counts == 0):
        counts[part] += 1
        counts[np.argmax(counts)] -= 1
    return counts


def _draw(size: int, count: int, random: np.random.Generator) -> np.ndarray:
    """[count] rows of a source, ascending: whole passes, and the rest drawn without replacement."""
    full, rest = divmod(count, size)
    drawn = random.choice(size, rest, replace=False, shuffle=False) if rest else np.zeros(0, np.int64)
    return np.sort(np.concatenate([np.tile(np.arange(size), full), drawn]))
