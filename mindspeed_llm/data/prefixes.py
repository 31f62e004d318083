"""Which prepared files a run trains, validates and tests on, told from its options and from what lies on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mindspeed_llm.arguments.data import DataOptions
from mindspeed_llm.data.blend import Blend, parse_data_path
from mindspeed_llm.data.dataset import IndexedDataset, RowSource, find_base, split_dataset
from mindspeed_llm.data.division import PARTS
from mindspeed_llm.data.index_cache import lengths_origin
from mindspeed_llm.errors import UsageError


@dataclass(frozen=True)
class Part:
    """The rows of one purpose.

    Attributes:
        source: all rows, data set after data set.
        prefixes: where they lie. sizes: rows of each.
        weights: share of each in a pass; empty where every row comes once.
    """

    source: RowSource
    prefixes: list[Path]
    sizes: list[int]
    weights: list[float] = field(default_factory=list)

    def blend(self, seed: int, shuffle: bool) -> Blend | None:
        """The rows of a pass where the data sets have shares, else None."""
        return Blend(self.sizes, self.weights, seed, shuffle) if self.weights else None


@dataclass(frozen=True)
class Parts:
    """What a run reads.

    Attributes:
        train: rows trained on.
        valid, test: rows held out; None without.
        files: every data set opened.
        notes: what the user did not say and was found, as sentences.
    """

    train: Part
    valid: Part | None
    test: Part | None
    files: list[IndexedDataset]
    notes: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> list[str]:
        """A hash over the lengths of all rows of each data set opened; the same on machines with the same files."""
        return [lengths_origin(file.lengths) for file in self.files]


def open_parts(options: DataOptions, kind: type[IndexedDataset] = IndexedDataset) -> Parts:
    """Open the files that --data-path, or --train-, --valid- and --test-data-path name.

    A prefix of --data-path without files of its own stands for `<prefix>_train`, `_valid` and `_test`, the parts that
    `preprocess_data.py --split` writes. Otherwise --split divides the rows by their content.

    Args:
        kind: what the rows are.

    Raises:
        UsageError: no data, or --split for data that are divided already.
        InputError: files that are missing, damaged, or too few rows.
    """
    if options.train_data_path:
        words = {part: getattr(options, f"{part}_data_path") for part in PARTS}
        given = {part: parse_data_path(said, f"--{part}-data-path") for part, said in words.items() if said}
        return _given_parts(given, kind)
    if not options.data_path:
        raise UsageError(
            "--data-path is missing: the --output-prefix given to preprocess_data.py; or name rows with --dataset"
        )
    weights, names = parse_data_path(options.data_path)
    prefixes = [Path(name).expanduser() for name in names]
    divided = [prefix for prefix in prefixes if _is_divided(prefix, kind)]
    if divided:
        return _divided_parts(options, weights, prefixes, divided, kind)
    whole = kind(prefixes)
    if not options.divides:
        return Parts(Part(whole, prefixes, whole.sizes, weights), None, None, [whole])
    bounds = np.cumsum([0, *whole.sizes])
    subsets = split_dataset(whole, options.split)
    train, valid, test = (
        Part(part, prefixes, np.diff(np.searchsorted(part.rows, bounds)).tolist()) if len(part) else None
        for part in subsets
    )
    return Parts(replace(train, weights=weights), valid, test, [whole])


def _given_parts(
    given: dict[str, tuple[list[float], list[str]]], kind: type[IndexedDataset], notes: Sequence[str] = ()
) -> Parts:
    """Each part from its own prefixes. Parts to validate or test on may be empty, and are then left out, and said."""
    files, parts, said = [], {}, list(notes)
    for name, (weights, prefixes) in given.items():
        data = kind(prefixes)
        if name != "train" and not len(data):
            said.append(f"no row for {name}: {' '.join(prefixes)} holds none")
            continue
        files.append(data)
        parts[name] = Part(data, data.prefixes, data.sizes, weights)
    return Parts(parts["train"], parts.get("valid"), parts.get("test"), files, said)


def _is_divided(prefix: Path, kind: type[IndexedDataset]) -> bool:
    """Whether a prefix stands for its parts: it has no files of its own, and `<prefix>_train` has."""
    train = prefix.with_name(f"{prefix.name}_train")
    return find_base(prefix, kind.REQUIRED) is None and find_base(train, kind.REQUIRED) is not None


def _divided_parts(
    options: DataOptions,
    weights: list[float],
    prefixes: list[Path],
    divided: list[Path],
    kind: type[IndexedDataset],
) -> Parts:
    """The parts `preprocess_data.py --split` has made of some prefixes; the other prefixes are trained on whole."""
    if options.divides:
        raise UsageError(
            f"--split {options.split}: {divided[0]} is divided already ({divided[0].name}_train ...); leave --split out"
        )
    given: dict[str, tuple[list[float], list[str]]] = {"train": (weights, [])}
    notes = []
    for prefix in prefixes:
        if prefix not in divided:
            given["train"][1].append(str(prefix))
            continue
        parts = {part: prefix.with_name(f"{prefix.name}_{part}") for part in PARTS}
        found = [part for part, path in parts.items() if find_base(path, kind.REQUIRED) is not None]
        notes.append(f"{prefix}: no files of that prefix; found {' '.join(f'{prefix.name}_{part}' for part in found)}")
        for part in found:
            given.setdefault(part, ([], []))[1].append(str(parts[part]))
    return _given_parts(given, kind, notes)
