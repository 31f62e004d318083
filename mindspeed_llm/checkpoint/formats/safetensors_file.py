"""The safetensors file format: 8 bytes of header length, a JSON header, then the tensors' bytes.

Read as lazily sliceable tensors; written tensor by tensor, so that memory holds one at a time.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mindspeed_llm.checkpoint.formats.blocks import Place, check_values, write_values
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, element_count
from mindspeed_llm.errors import InputError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PRODUCER = {"format": "pt", "producer": "mindspeed_llm"}
"""The files' own metadata: transformers wants the format; the producer tells our exports from a model's original."""
HEADER_LIMIT = 100_000_000
"""Bytes; the format's own limit on headers."""


def read_safetensors(path: str | Path) -> dict[str, LazyTensor]:
    """The tensors of a file by name; only the header is read.

    Raises:
        InputError: missing, truncated, or the header does not describe the file.
    """
    path = Path(path)
    header, start, size = read_header(path)
    found = {name: tensor_of(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"}
    position, last = start, "the header"
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < position:
            raise InputError(f"{path}: {name} begins at byte {tensor.offset}, inside {last}; broken file")
        position, last = tensor.offset + tensor.nbytes, name
    if position > size:
        raise InputError(f"{path}: {last} ends at byte {position} of {size}; truncated file")
    return found


def read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header, where the tensors' bytes begin, and the file's size; `InputError` when it is broken."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise InputError(f"{path}: header of {length} bytes in a file of {size}; truncated or not safetensors")
            header = json.loads(file.read(length), object_pairs_hook=without_duplicates)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: broken safetensors header ({error})") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: the safetensors header is not an object; broken file")
    return header, 8 + length, size


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; `ValueError` when it names something twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is stored twice")
    return found


def is_export(folder: str | Path) -> bool:
    """Whether the safetensors files of a folder were written here."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return bool(files) and read_header(files[0])[0].get("__metadata__") == PRODUCER


def tensor_of(path: Path, name: str, entry: Mapping, start: int) -> LazyTensor:
    """One header entry; `start` is where the tensors' bytes begin."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {name}: broken header entry {entry!r:.100}") from error
    if not all(type(size) is int and size >= 0 for size in (*shape, begin, end)):
        raise InputError(f"{path}: {name}: broken header entry {entry!r:.100}")
    if dtype not in DTYPES:
        raise InputError(f"{path}: {name}: type {dtype} is not supported (known: {', '.join(DTYPES)})")
    tensor = LazyTensor(path, start + begin, DTYPES[dtype], shape)
    if end - begin != tensor.nbytes:
        raise InputError(
            f"{path}: {name}: {dtype} {list(shape)} needs {tensor.nbytes} bytes, the header says {end - begin}"
        )
    return tensor


class SafetensorsWriter:
    """One file being written: every tensor's place is known before the first value arrives."""

    def __init__(
        self, path: str | Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], create: bool = True
    ) -> None:
        """Write the header and reserve the space, or join in.

        Args:
            tensors: type and shape by name, in file order.
            create: False when another process has made the file from the same `tensors` and shares the work.
        """
        self.path = Path(path)
        header: dict[str, object] = {"__metadata__": PRODUCER}
        position = 0
        for name, (dtype, shape) in tensors.items():
            end = position + element_count(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.descriptor = os.open(self.path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if create else 0), 0o640)
        if create:
            os.pwrite(self.descriptor, len(text).to_bytes(8, "little") + text, 0)
            os.ftruncate(self.descriptor, 8 + len(text) + position)
        self.start = 8 + len(text)
        self.header = header
        self.tensors = dict(tensors)
        self.nbytes = position
        self.missing = set(tensors)

    def place(self, name: str, expert: int | None = None, transposed: bool = False) -> Place:
        """Where a tensor's values go, or one expert's of a tensor [experts, ...], which may lie there transposed."""
        dtype, shape = self.tensors[name]
        offset = self.start + self.header[name]["data_offsets"][0]
        self.missing.discard(name)
        if expert is None:
            return Place(self.descriptor, offset, dtype, shape)
        offset += expert * element_count(shape[1:]) * dtype.itemsize
        return Place(self.descriptor, offset, dtype, shape[:0:-1] if transposed else shape[1:], transposed)

    def write(self, name: str, values: torch.Tensor) -> None:
        """Write one whole tensor; `InputError` when type or shape are not those announced."""
        place = self.place(name)
        check_values(name, values, place, place.shape)
        write_values(place.descriptor, place.offset, values)

    def close(self, whole: bool = True) -> None:
        """Make the file durable; `InputError` when a tensor never came.

        Args:
            whole: this process was to write every tensor.
        """
        os.fsync(self.descriptor)
        os.close(self.descriptor)
        if whole and self.missing:
            raise InputError(f"{self.path}: tensors never written: {sorted(self.missing)}")
