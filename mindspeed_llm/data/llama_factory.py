"""Data sets as LLaMA-Factory names them: entries of a `dataset_info.json`.

An entry says where the rows lie (`file_name`, or `hf_hub_url` with the id of a data set of the hub), in which format
(`formatting`: alpaca or sharegpt), under which names (`columns`, `tags`), how many of them take part (`num_samples`),
and whether they hold preferences (`ranking`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_llm.data.handlers import get_handler
from mindspeed_llm.data.sources import files_of_hub, subset_files
from mindspeed_llm.errors import InputError, UsageError, unknown

HANDLER = "LlamaFactoryInstructionHandler"
INFO = "dataset_info.json"
# formatting -> handler of instructions, handler of preferences
HANDLERS = {
    "alpaca": ("AlpacaStyleInstructionHandler", "AlpacaStylePairwiseHandler"),
    "sharegpt": ("SharegptStyleInstructionHandler", "SharegptStylePairwiseHandler"),
}
WORDS = {Mapping: "object", int: "whole number", str: "text"}
TYPES: dict[str, type] = {
    "file_name": str, "hf_hub_url": str, "subset": str, "folder": str, "split": str, "num_samples": int,
    "columns": Mapping, "tags": Mapping,
}  # fmt: skip
REMEDY = "that is neither fetched nor executed; put the file into the folder and name it in file_name"
ELSEWHERE = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


@dataclass(frozen=True)
class NamedData:
    """An entry, resolved.

    Attributes:
        files, unused: those of the rows, and others beside them.
        handler, map_keys: how they are read; the keys as JSON text.
        count: rows that take part, drawn or repeated; None for all.
    """

    name: str
    files: list[Path]
    unused: list[Path]
    handler: str
    map_keys: str
    count: int | None = None


def named_data(folder: str | None, names: str) -> list[NamedData]:
    """The entries called `names`, separated by commas, of the folder's dataset_info.json.

    Raises:
        UsageError: no folder is given, or it has no entry of a name. InputError: the file or an entry cannot be read.
    """
    if folder is None:
        raise UsageError(f"--handler-name {HANDLER} needs --dataset-dir, the folder that holds {INFO}")
    file = Path(folder).expanduser() / INFO
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); check --dataset-dir") from error
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(entries, Mapping):
        raise InputError(f"{file} is not a JSON object of data sets by name")
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in entries:
            raise unknown(f"data set of {file}", name, entries)
    return [_resolved(name, entries[name], file.parent) for name in wanted]


def _resolved(name: str, entry: Any, folder: Path) -> NamedData:
    """An entry as path, handler and names of columns."""
    place = f"{folder / INFO}, entry {name!r}"
    if not isinstance(entry, Mapping):
        raise InputError(f"{place} is not a JSON object")
    for key, expected in TYPES.items():
        if entry.get(key) is not None and not isinstance(entry[key], expected):
            raise InputError(f"{place}: {key} is {entry[key]!r}, which is no {WORDS[expected]}")
    if not entry.get("file_name") and not entry.get("hf_hub_url"):
        given = next((key for key in ELSEWHERE if key in entry), None)
        raise InputError(f"{place} has no file_name{f' but {given} {entry[given]!r}: {REMEDY}' if given else ''}")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in HANDLERS:
        raise InputError(f"{place}: formatting {formatting!r} is not one of {', '.join(HANDLERS)}")
    if entry.get("split", "train") != "train":
        raise InputError(
            f"{place}: split {entry['split']!r}: only train is read; name the part's own file in file_name"
        )
    if entry.get("num_samples") is not None and entry["num_samples"] < 1:
        raise InputError(f"{place}: num_samples {entry['num_samples']}: must be at least 1")
    keys = dict(entry.get("columns") or {})
    if entry.get("tags"):
        keys["tags"] = entry["tags"]
    handler = HANDLERS[formatting][bool(entry.get("ranking"))]
    try:
        get_handler(handler, keys)
    except UsageError as error:
        raise InputError(f"{place}: {str(error).replace('--map-keys', 'columns')}") from error
    subset = entry.get("subset") or entry.get("folder")
    if entry.get("file_name"):
        found = subset_files(folder / entry["file_name"], subset, f"{place}:")
    else:
        found = files_of_hub(entry["hf_hub_url"], subset, f"{place}:")
    return NamedData(name, *found, handler, json.dumps(keys, sort_keys=True), entry.get("num_samples"))


def forms_of(data: Sequence[NamedData]) -> list[tuple[str, str, str]]:
    """(name, handler, map keys) of each way of reading rows among the entries."""
    return list(dict.fromkeys((form_name(entry), entry.handler, entry.map_keys) for entry in data))


def form_name(entry: NamedData) -> str:
    """The name under which an entry's way of reading rows is known within a run."""
    return f"{entry.handler} {entry.map_keys}"
