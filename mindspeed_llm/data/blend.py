"""Several data sets in stated shares: `--data-path 0.3 first 0.7 second`."""

from collections.abc import Sequence

import numpy as np

from mindspeed_llm.errors import InputError, UsageError


def parse_data_path(words: Sequence[str], flag: str = "--data-path") -> tuple[list[float], list[str]]:
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
        raise UsageError(f"{flag} {given}: give a weight before every prefix, such as 0.3 FIRST 0.7 SECOND")
    weights = [number for number in numbers[0::2] if number is not None]
    if min(weights) <= 0 or not np.isfinite(weights).all():
        raise UsageError(f"{flag} {given}: weights must be above 0")
    return [weight / sum(weights) for weight in weights], list(words[1::2])


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


class Blend:
    """Which rows a pass reads of several data sets that stand one after the other, as many of each as its weight says.

    A pass has as many rows as the data sets have together. Each data set is gone through pass after pass in an order
    of its own, and a pass of the blend takes up where the one before has stopped: at any moment of the run no row of a
    data set has been read more often than another by more than one, and nothing of a large one is left out for good.

    Attributes:
        sizes, weights: rows and share of each data set.
        counts: [data sets] int64, rows of each in one pass.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool = True) -> None:
        """Args:
            sizes: rows of each data set.
            weights: one above zero for each; they need not sum to one.
            shuffle: False takes each data set's rows in their order.

        Raises:
            InputError: a data set has no rows.
            UsageError: not one weight per data set.
        """
        if len(sizes) != len(weights) or any(weight <= 0 for weight in weights):
            raise UsageError(f"{len(sizes)} data sets are blended with the weights {list(weights)}; one above 0 each")
        empty = [number for number, size in enumerate(sizes) if not size]
        if empty:
            raise InputError(f"data set {empty[0] + 1} of the blend holds no rows")
        self.sizes, self.weights, self.seed, self.shuffle = list(sizes), list(weights), seed, shuffle
        self.counts = shares_of(sum(sizes), weights)

    def __len__(self) -> int:
        """Rows of one pass."""
        return sum(self.sizes)

    def rows(self, number: int) -> np.ndarray:
        """[len] int64, rows of pass `number` (from 0), the data sets spread evenly over it."""
        starts = np.cumsum([0, *self.sizes[:-1]])
        drawn = [start + self._stretch(part, number) for part, start in enumerate(starts.tolist())]
        place = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts.tolist()])
        return np.concatenate(drawn)[np.argsort(place, kind="stable")]

    def _stretch(self, part: int, number: int) -> np.ndarray:
        """[counts[part]] rows of one data set that pass `number` of the blend reads."""
        size, count = self.sizes[part], int(self.counts[part])
        first, begin = divmod(number * count, size)
        last, end = divmod((number + 1) * count, size)
        if first == last:
            return self._order(part, first)[begin:end]
        # passes that lie within this one whole are shuffled with it; only the cut ones must be continued exactly
        whole = np.tile(np.arange(size), last - first - 1)
        tail = self._order(part, last)[:end] if end else np.zeros(0, np.int64)
        return np.concatenate([self._order(part, first)[begin:], whole, tail])

    def _order(self, part: int, number: int) -> np.ndarray:
        """[sizes[part]] rows of a data set in the order of its own pass `number`."""
        if not self.shuffle:
            return np.arange(self.sizes[part])
        return np.random.default_rng([self.seed, number, part]).permutation(self.sizes[part])


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
