"""The weight files of an HF folder: safetensors or `.bin`, one file or shards, with or without an index.

Names of shards may be links out of the folder (the hub's cache stores files so); the index may not point there.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mindspeed_llm.checkpoint.formats.bin_file import read_bin
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor
from mindspeed_llm.checkpoint.formats.safetensors_file import read_safetensors
from mindspeed_llm.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.\w+$")


class Kind(NamedTuple):
    """One way a folder can hold weights."""

    suffix: str
    single: str
    index: str
    shards: str


KINDS = (
    Kind(".safetensors", SINGLE, INDEX, "model-*.safetensors"),
    Kind(".bin", "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
)
"""In order of preference: where both lie, safetensors are read."""


def read_folder(folder: Path) -> dict[str, LazyTensor]:
    """All tensors of a folder, by name; only headers are read.

    Raises:
        InputError: no weights, files missing, truncated or outside the folder, or a tensor stored twice.
    """
    for kind in KINDS:
        if present(folder / kind.index):
            return read_shards(folder, kind.index)
        found = lone_files(folder, kind)
        if found:
            return join_files(folder, found)
    seen = sorted(path.name for kind in KINDS for path in folder.glob(f"*{kind.suffix}"))
    raise InputError(
        f"{folder}: no weights: neither {' nor '.join(name for kind in KINDS for name in (kind.index, kind.single))}"
        + (f"; {', '.join(seen[:3])} are not told apart without an index" if seen else "")
    )


def lone_files(folder: Path, kind: Kind) -> list[str]:
    """The files to read where there is no index: the one of the usual name, numbered shards, or the only one."""
    if present(folder / kind.single):
        return [kind.single]
    shards = sorted(path.name for path in folder.glob(kind.shards))
    if shards:
        check_numbers(folder, shards)
        return shards
    others = sorted(path.name for path in folder.glob(f"*{kind.suffix}"))
    return others if len(others) == 1 and kind.suffix == ".safetensors" else []


def check_numbers(folder: Path, shards: list[str]) -> None:
    """`InputError` when names say that there are more shards than lie here."""
    counts = {int(match[2]) for name in shards if (match := NUMBERED.search(name))}
    if counts and counts != {len(shards)}:
        raise InputError(
            f"{folder}: {len(shards)} shards ({shards[0]} ...) of {' or '.join(map(str, sorted(counts)))};"
            " download the missing ones"
        )


def present(path: Path) -> bool:
    """Whether a file is there; `InputError` for a folder of its name and a link that leads nowhere."""
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path}: a link to {path.readlink()}, which does not exist; download it again")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file; download it again")
    return path.is_file()


def read_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file; `InputError` when it is not there or damaged."""
    if not present(path):
        raise InputError(f"{path}: no such file")
    return read_bin(path) if path.suffix == ".bin" else read_safetensors(path)


def join_files(folder: Path, files: Iterable[str]) -> dict[str, LazyTensor]:
    """The union of files; `InputError` when two hold a tensor of the same name."""
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        for name, tensor in read_file(folder / file).items():
            if name in tensors:
                raise InputError(
                    f"{folder / file}: {name} is stored twice, in {tensors[name].path.name} too; remove one"
                )
            tensors[name] = tensor
    return tensors


def read_shards(folder: Path, index_name: str) -> dict[str, LazyTensor]:
    """The tensors an index lists; every shard has to lie in the folder and hold what the index says."""
    index = folder / index_name
    where = read_index(index)
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard:
            raise InputError(f"{index}: shard {shard!r} lies outside the folder; refused")
        if not present(folder / shard):
            raise InputError(f"{folder / shard}: no such file, but {index_name} lists it; download it again")
    tensors = join_files(folder, sorted(set(where.values())))
    lost = sorted(set(where) - set(tensors))
    if lost:
        raise InputError(f"{folder}: {len(lost)} tensors of {index_name} are in no shard: {', '.join(lost[:5])}")
    wrong = sorted(name for name, shard in where.items() if tensors[name].path.name != shard)
    if wrong:
        raise InputError(
            f"{index}: says {wrong[0]} is in {where[wrong[0]]}, it is in {tensors[wrong[0]].path.name}"
            f" ({len(wrong)} such tensors); the index belongs to other shards"
        )
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> shard name; `InputError` when the index is broken."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(where, dict) or not all(isinstance(shard, str) and shard for shard in where.values()):
            raise ValueError("weight_map does not give a file name for each tensor")
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{index}: broken index ({type(error).__name__}: {error})") from error
    if not where:
        raise InputError(f"{index}: broken index (it lists no tensors)")
    return where
