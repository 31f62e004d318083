"""A run in parts: each made on its own, on one machine or on many, then merged to the bytes one run would give.

A part holds a range of the rows, unpacked and undivided. Its report says by a key from what it was made, so that a part
that is there is not made again and parts of different runs are not mixed.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data.complete import Recipe, complete
from mindspeed_llm.data.division import hash_rows
from mindspeed_llm.data.indexed_file import IndexedFileWriter, RowFile
from mindspeed_llm.data.plan import Plan, packing_of, refuse_existing
from mindspeed_llm.data.publish import Aside, settle
from mindspeed_llm.data.report import Account, read_report, report_path, write_json
from mindspeed_llm.data.row_files import refuse_bad, row_file, stored_fields, write_rows
from mindspeed_llm.errors import InputError

log = logging.getLogger(__name__)

SHARD = re.compile(r"(?P<name>.*)_shard_(?P<index>\d{5})_of_(?P<count>\d{5})")


def shard_prefix(prefix: Path, index: int, count: int) -> Path:
    """Output prefix of one part."""
    return prefix.with_name(f"{prefix.name}_shard_{index:05d}_of_{count:05d}")


def make_shard(plan: Plan, index: int) -> Path:
    """Make one part, unless it is there; returns its prefix.

    Raises:
        InputError: a part of another run is there, or the input cannot be read.
    """
    count = plan.options.num_shards
    prefix = shard_prefix(plan.prefix, index, count)
    settle(prefix)
    there = read_report(prefix)
    if there is not None and there.get("shard", {}).get("key") == plan.key and not plan.options.overwrite:
        log.info("part %s of %s is there already: %s", index, count, prefix)
        return prefix
    names = [f"{prefix.name}{plan.stem}_{field}_document" for field in stored_fields(plan)]
    files = [f"{name}.{kind}" for kind in ("bin", "idx") for name in names] + [report_path(prefix).name]
    refuse_existing([prefix.parent / name for name in files], plan.options.overwrite)
    total = plan.mixture.total
    begin, end = total * index // count, total * (index + 1) // count
    with Aside(prefix) as aside:
        account = write_rows(plan, aside.path, begin, end)
        for field, name in zip(stored_fields(plan), names, strict=True):
            for kind in ("bin", "idx"):
                Path(f"{row_file(aside.path, field)}.{kind}").replace(aside.path / f"{name}.{kind}")
        shard = {"key": plan.key, "index": index, "count": count, "begin": begin, "end": end}
        report = {**plan.description, "sequences": account.written, **account.to_dict(), "shard": shard}
        write_json(aside.path / report_path(prefix).name, report)
        aside.publish(files)
    log.info("part %s of %s: rows %s to %s, %s written: %s", index, count, begin, end, account.written, prefix)
    return prefix


def find_shards(folder: Path) -> list[Path]:
    """Prefixes of the parts in a folder, in their order; empty when it holds none.

    Raises:
        InputError: parts are missing, or there are parts of several runs.
    """
    found: dict[str, list[tuple[int, int, Path]]] = {}
    for file in sorted(folder.glob("*_report.json")):
        prefix = file.with_name(file.name.removesuffix("_report.json"))
        match = SHARD.fullmatch(prefix.name)
        if match:
            found.setdefault(match["name"], []).append((int(match["index"]), int(match["count"]), prefix))
    if not found:
        return []
    if len(found) > 1:
        raise InputError(f"{folder} holds parts of several runs ({', '.join(sorted(found))}); keep one run to a folder")
    parts = next(iter(found.values()))
    counts = {count for _, count, _ in parts}
    if len(counts) > 1:
        raise InputError(f"{folder} holds parts of {' and of '.join(map(str, sorted(counts)))}; keep one run apart")
    count = counts.pop()
    missing = sorted(set(range(count)) - {index for index, _, _ in parts})
    if missing:
        raise InputError(
            f"{folder} lacks part {', '.join(map(str, missing[:8]))} of {count}; make it with --num-shards {count} "
            f"--shard-index {missing[0]}"
        )
    return [prefix for _, _, prefix in sorted(parts)]


def merge_shards(
    shards: Sequence[Path],
    prefix: Path,
    options: PreprocessOptions,
    key: str | None,
    decode_with: Callable[[Mapping[str, Any]], Any],
) -> dict[str, Any]:
    """Merge, divide and pack the parts; returns the report.

    Args:
        options: say how to divide and to pack.
        key: of the run, for its report; left out, the parts'.
        decode_with: (a part's report) -> token ids to text, or None.

    Raises:
        InputError: parts of different runs, too many bad rows, or files that exist.
    """
    reports = [_shard_report(shard) for shard in shards]
    keys = {report["shard"]["key"] for report in reports}
    if len(keys) > 1:
        raise InputError(
            f"{shards[0].parent}: the parts were made from different inputs, options or tokenizers; make them again"
        )
    about = {name: value for name, value in reports[0].items() if name in ABOUT}
    recipe = Recipe(
        prefix, about["stem"], about["fields"], options.split, packing_of(options, about["tokenizer"]["pad_id"])
    )
    refuse_existing([prefix.parent / name for name in recipe.names], options.overwrite)
    account = Account.merged(reports)
    if not options.compat:
        refuse_bad(account, str(shards[0].parent), options.on_bad_row)
    stored = [field for field in recipe.fields if not (recipe.packing and field == "attention_mask")]
    with Aside(prefix) as aside:
        for number, field in enumerate(stored):
            sources = [shard.with_name(f"{shard.name}{recipe.stem}_{field}_document") for shard in shards]
            concatenate(sources, row_file(aside.path, field))
            if number == 0:
                account.hashes.frombytes(hash_rows(row_file(aside.path, field)).tobytes())
        about |= {name: getattr(options, name) for name in ("seq_length", "pack", "neat_pack")}
        about["key"] = key or keys.pop()
        report = complete(recipe, aside.path, account, about, decode_with(about))
        aside.publish(recipe.names)
    return report


# what a part's report says about the whole run, besides the account of its rows
ABOUT = (
    "format", "sources", "input", "handler", "template", "enable_thinking", "tokenizer", "seq_length", "pack",
    "neat_pack", "fields", "stem", "options",
)  # fmt: skip


def recorded_options(shards: Sequence[Path], options: PreprocessOptions) -> PreprocessOptions:
    """The merging command's options, with those it does not give taken from the parts' run."""
    recorded = _shard_report(shards[0])["options"]
    names = ("pack", "neat_pack", "seq_length", "split", "seed", "compat", "n_subs", "on_bad_row")
    taken = {name: recorded[name] for name in names if name in recorded and name not in options.parsed.given}
    return replace(options, **taken)


def remove_shards(prefix: Path, count: int) -> None:
    """Remove the parts of a run that has been merged: their reports first, so that none is taken for whole."""
    for file in sorted(shard_files(prefix, count), key=lambda file: file.suffix != ".json"):
        file.unlink(missing_ok=True)


def shard_files(prefix: Path, count: int) -> list[Path]:
    """The files of all parts of a run that are there."""
    pattern = "".join(f"[{c}]" if c in "*?[" else c for c in prefix.name) + f"_shard_?????_of_{count:05d}_*"
    return list(prefix.parent.glob(pattern))


def _shard_report(shard: Path) -> dict[str, Any]:
    report = read_report(shard)
    if report is None or "shard" not in report:
        raise InputError(f"{report_path(shard)} is no report of a part; make the part again")
    return report


def concatenate(sources: Sequence[Path], target: Path) -> None:
    """Write the sequences of several pairs of files one after the other into one.

    Raises:
        InputError: a pair is incomplete, or they have different element types.
    """
    with RowFile(sources[0]) as first:
        dtype = first.index.dtype
    with IndexedFileWriter(target, dtype) as writer:
        for source in sources:
            with RowFile(source) as rows:
                if rows.index.dtype != dtype:
                    raise InputError(f"{source} holds {rows.index.dtype}, {sources[0]} {dtype}; merge one type only")
                documents = _document_lengths(rows)
                if documents is not None:
                    writer.add(rows.rows(0, len(rows)), documents)
                    continue
                for begin, end in rows.blocks():
                    writer.add(rows.rows(begin, end), rows.lengths[begin:end].tolist())


def _document_lengths(rows: RowFile) -> list[int] | None:
    """Lengths with -1 for documents without a sequence; None when every sequence is a document."""
    documents = np.asarray(rows.index.documents)
    sizes = np.diff(documents)
    if len(sizes) == len(rows) and (sizes == 1).all():
        return None
    if sizes.max(initial=0) > 1:
        raise InputError(f"{rows.index.prefix} has documents of several sequences, which are not merged")
    lengths = np.full(len(sizes), -1, np.int64)
    lengths[sizes == 1] = rows.lengths
    return lengths.tolist()


def merge_by_name(folder: Path, prefix: Path, keys: Sequence[str], overwrite: bool) -> dict[str, Any]:
    """Merge all pairs of files whose name holds a key, in name order, to `<prefix>_<key>`; other programs' files too.

    Returns:
        files and sequences of each key.

    Raises:
        InputError: no file has the key in its name, one of a pair is missing, or a result exists.
    """
    targets = [prefix.with_name(f"{prefix.name}_{key}.{kind}") for kind in ("bin", "idx") for key in keys]
    refuse_existing(targets, overwrite)
    merged: dict[str, Any] = {}
    with Aside(prefix) as aside:
        for key in keys:
            pairs = (file for file in folder.iterdir() if file.suffix in (".bin", ".idx"))
            names = sorted({file.stem for file in pairs if key in file.stem})
            if not names:
                raise InputError(f"--merge-group-keys {key}: no file in {folder} has that in its name")
            target = aside.path / f"{prefix.name}_{key}"
            concatenate([folder / name for name in names], target)
            with RowFile(target) as rows:
                merged[key] = {"files": names, "sequences": len(rows)}
        aside.publish([target.name for target in targets])
    log.info("merged: %s", json.dumps(merged))
    return merged
