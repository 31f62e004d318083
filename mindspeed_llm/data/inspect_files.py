"""What existing files hold: `--inspect <prefix>` prints their rows as text, trained tokens marked."""

import re
import sys
from pathlib import Path

import numpy as np

from mindspeed_llm.data.indexed_file import IndexedFile
from mindspeed_llm.data.preview import Shown, as_text, show_row, wants_colour
from mindspeed_llm.data.report import read_report
from mindspeed_llm.data.tokenizer import Tokenizer, load_tokenizer
from mindspeed_llm.errors import InputError, UsageError

ENDING = re.compile(r"(_packed)?_((chosen|rejected)_)?(input_ids|attention_mask|labels)_document(\.bin|\.idx)?$")


def inspect_prefix(prefix: Path, count: int, tokenizer: str | None) -> None:
    """Print the first rows of an output prefix.

    Args:
        prefix: of preprocess_data.py, or of other programs' files of the same kind; one of the files stands for it.
        count: how many rows.
        tokenizer: its folder; left out, the one that the report names.

    Raises:
        InputError: no such files, or no tokenizer.
        UsageError: the tokenizer is not known.
    """
    prefix = prefix.expanduser()
    prefix = prefix.with_name(ENDING.sub("", prefix.name) or prefix.name)
    fields = open_fields(prefix)
    decoder = _tokenizer(prefix, tokenizer)
    colour = wants_colour(sys.stdout)
    for file in fields.values():
        tokens = int(np.asarray(file.lengths).sum(dtype=np.int64))
        print(f"{file.prefix}: {len(file)} sequences, {tokens} tokens, {file.dtype}")
    for number in range(min(count, max(map(len, fields.values())))):
        for row in rows_at(fields, number, decoder):
            print(as_text(row, colour))


def open_fields(prefix: Path) -> dict[str, IndexedFile]:
    """All pairs of files of a prefix, by the name of their field.

    Raises:
        InputError: there are none.
    """
    found = {}
    for file in sorted(prefix.parent.glob("*_document.idx")) if prefix.parent.is_dir() else []:
        name = file.name.removesuffix(".idx")
        rest = name.removeprefix(prefix.name).removeprefix("_packed")
        if name.startswith(prefix.name) and rest.startswith("_") and "_shard_" not in rest:
            found[rest[1:].removesuffix("_document")] = IndexedFile(file.with_suffix(""))
    if not found:
        raise InputError(f"--inspect {prefix}: no file {prefix.name}*_document.idx in {prefix.parent}")
    return found


def rows_at(fields: dict[str, IndexedFile], number: int, tokenizer: Tokenizer) -> list[Shown]:
    """Row `number` of every field that holds tokens, with the labels that belong to it."""
    shown = []
    for field, file in fields.items():
        if number >= len(file) or field.endswith("attention_mask"):
            continue
        if field.endswith("labels") and _belong(file, fields.get(field.replace("labels", "input_ids"))):
            continue
        labels = fields.get(field.replace("input_ids", "labels")) if field.endswith("input_ids") else None
        if not _belong(file, labels):
            labels = None
        ids = file[number]
        title = f"row {number + 1}" + ("" if field == "input_ids" else f", {field}")
        row = show_row(title, ids, None if labels is None else labels[number], tokenizer.decode)
        mask = fields.get("attention_mask") if field == "input_ids" else None
        if mask is not None and int(mask[number].max(initial=0)) > 1:
            sizes = np.bincount(mask[number])[1:].tolist()
            row.notes.append(f"a neat pack of {len(sizes)} rows of {', '.join(map(str, sizes))} tokens")
        shown.append(row)
    return shown


def _belong(ids: IndexedFile, labels: IndexedFile | None) -> bool:
    """Whether labels are those of the ids; of another length they are a text of their own (R1 handlers)."""
    return labels is not None and np.array_equal(ids.lengths, labels.lengths)


def _tokenizer(prefix: Path, given: str | None) -> Tokenizer:
    if given is not None:
        return load_tokenizer(given)
    report = read_report(prefix)
    if report is None:
        raise UsageError(f"--inspect {prefix}: the files have no report that names a tokenizer; give one with "
                         "--tokenizer-name-or-path")  # fmt: skip
    return load_tokenizer(report["tokenizer"]["path"])
