"""The files of a `torch_dist` checkpoint (torch.distributed.checkpoint's format), read without executing anything.

`.metadata` is a pickle of dataclasses: for each key the type, the whole shape and the chunks that make it up, and for
each chunk the file and the bytes where it lies. There it is a torch file of its own, which holds one tensor.
"""

import io
import itertools
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mindspeed_llm.checkpoint.formats.lazy import MANY_RANGES, LazyTensor, contiguous_stride
from mindspeed_llm.checkpoint.formats.pickle_machine import Constructor, Global, Inert, PickleMachine
from mindspeed_llm.checkpoint.formats.torch_file import DTYPES, PickleReader, Storage
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.errors import InputError

METADATA = ".metadata"
CLASSES = "torch.distributed.checkpoint.metadata"
RECORDS = (
    *(
        Global(CLASSES, name)
        for name in (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta",
        )
    ),
    Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
)  # fmt: skip


class Record(Inert):
    """A dataclass of the format: its name and state. Unlike other inert records it may be a key."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __getitem__(self, field: str) -> Any:
        """One field; `KeyError` without it."""
        return self.state[field]

    def get(self, field: str) -> Any:
        """One field, None without it."""
        return self.state.get(field)


@dataclass(frozen=True)
class Chunk:
    """One box of a stored tensor, and where its torch file lies.

    Attributes:
        offsets: of its first element, along each dimension.
        sizes: along each dimension.
        start, length: bytes in `path`.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    length: int

    @cached_property
    def tensor(self) -> LazyTensor:
        """The tensor of its torch file; `InputError` when that is broken or another one."""
        found = read_embedded(self.path, self.start, self.length)
        if not isinstance(found, LazyTensor) or found.shape != self.sizes:
            shape = list(found.shape) if isinstance(found, LazyTensor) else type(found).__name__
            raise InputError(f"{self.path}: at byte {self.start} lies {shape}, {METADATA} says {list(self.sizes)}")
        return found

    def inner(self, place: Sequence[int]) -> LazyTensor:
        """The matrix or vector at a place of the leading axes (given in the whole tensor's numbers)."""
        whole = self.tensor
        stride = whole.stride or contiguous_stride(whole.shape)
        skipped = sum((at - off) * step for at, off, step in zip(place, self.offsets, stride, strict=False))
        offset = whole.offset + skipped * whole.dtype.itemsize
        return LazyTensor(whole.path, offset, whole.dtype, whole.shape[len(place) :], stride[len(place) :])


class StoredTensor(NamedTuple):
    """One key of a checkpoint that is a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def by_place(self, leading: int) -> dict[tuple[int, ...], list[Chunk]]:
        """The chunks that lie at each place of the first `leading` axes."""
        found: dict[tuple[int, ...], list[Chunk]] = {}
        for chunk in self.chunks:
            sides = zip(chunk.offsets[:leading], chunk.sizes[:leading], strict=True)
            for place in itertools.product(*(range(start, start + size) for start, size in sides)):
                found.setdefault(place, []).append(chunk)
        return found


@dataclass(frozen=True)
class ChunkedTensor:
    """A matrix or vector made of chunks (`Readable`).

    Attributes:
        shape: in elements; rows the chunks have beyond it (a padded vocabulary) are not part of it.
        place: of the matrix, along the leading axes of the stored tensor.
        chunks: those at that place.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    place: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def read(self, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The tensor, or a box of it; of each chunk only what lies in the box is read."""
        asked = [list(ranges) if ranges is not None else None for ranges in (rows, columns)][: len(self.shape)]
        box = [ranges if ranges is not None else [(0, size)] for ranges, size in zip(asked, self.shape, strict=True)]
        for dim, ranges in enumerate(box):
            if any(not 0 <= start <= stop <= self.shape[dim] for start, stop in ranges):
                raise IndexError(f"{ranges} of dimension {dim}, which has {self.shape[dim]}")
        result = torch.empty([sum(stop - start for start, stop in ranges) for ranges in box], dtype=self.dtype)
        leading = len(self.place)
        for chunk in self.chunks:
            hits = [
                overlap(ranges, chunk.offsets[leading + dim], chunk.sizes[leading + dim])
                for dim, ranges in enumerate(box)
            ]
            if not all(inside for inside, _ in hits):
                continue
            values = chunk.inner(self.place).read(*(inside for inside, _ in hits))
            if values.shape == result.shape:
                return values
            put(result, values, [outside for _, outside in hits])
        return result


def overlap(ranges: Ranges, start: int, size: int) -> tuple[Ranges, Ranges]:
    """What of `ranges` lies in [start, start + size): counted from `start`, and within the sequence of the ranges."""
    inside, outside, position = [], [], 0
    for low, high in ranges:
        first, last = max(low, start), min(high, start + size)
        if first < last:
            inside.append((first - start, last - start))
            outside.append((position + first - low, position + last - low))
        position += high - low
    return inside, outside


def put(result: torch.Tensor, values: torch.Tensor, ranges: Sequence[Ranges]) -> None:
    """Copy a box to the `ranges` of each dimension of `result`."""
    if any(len(one) > MANY_RANGES for one in ranges):
        places = [torch.cat([torch.arange(*pair) for pair in one]) for one in ranges]
        result[torch.meshgrid(*places, indexing="ij")] = values
        return
    starts = [itertools.accumulate((stop - start for start, stop in one), initial=0) for one in ranges]
    sides = [[(slice(*pair), slice(at, at + pair[1] - pair[0])) for pair, at in zip(one, begin, strict=False)]
             for one, begin in zip(ranges, starts, strict=True)]  # fmt: skip
    for pieces in itertools.product(*sides):
        result[tuple(to for to, _ in pieces)] = values[tuple(origin for _, origin in pieces)]


class Window(io.RawIOBase):
    """A part of an open file, read as if it were a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        """`file` stays open and belongs to the caller."""
        super().__init__()
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """Of the whole file."""
        return self.file.fileno()

    def tell(self) -> int:
        """Within the part."""
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Within the part."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = max(0, origin + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the part goes."""
        size = max(0, min(len(buffer), self.length - self.position))
        self.file.seek(self.start + self.position)
        data = self.file.read(size)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


class EmbeddedReader(PickleReader):
    """Reads a torch file that is a part of another file: its tensors are at offsets of the whole file."""

    def __init__(self, window: Window, path: Path, prefix: str, members: Mapping[str, zipfile.ZipInfo]) -> None:
        """`window` is the part."""
        super().__init__(path, window, prefix, members)
        self.size = window.length
        self.base = window.start

    def storage(self, identity: Any) -> Storage:
        """As in a file of its own, moved to where the part begins."""
        found = super().storage(identity)
        return found._replace(offset=found.offset + self.base)


def read_embedded(path: Path, start: int, length: int) -> Any:
    """The object of a torch file that lies in a part of `path`; `InputError` when it is broken."""
    try:
        with path.open("rb") as file:
            window = Window(file, start, length)
            with zipfile.ZipFile(window) as archive:
                members = {info.filename: info for info in archive.infolist()}
                pickles = [name for name in members if name.endswith("/data.pkl")]
                if len(pickles) != 1:
                    raise InputError(f"{path}: at byte {start}: a zip archive without a data.pkl; broken file")
                data = archive.read(pickles[0])
                return EmbeddedReader(window, path, pickles[0].removesuffix("data.pkl"), members).run(data)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise InputError(f"{path}: at byte {start}: not a complete torch file ({error}); broken file") from error


def read_index(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of a checkpoint by key, and the keys of other objects; only `.metadata` is read.

    Raises:
        InputError: the file is missing or broken, points outside the folder, or to bytes that are not there.
    """
    path = folder / METADATA
    try:
        content = unpickle(path.read_bytes(), str(path))
        where = {
            (index["fqn"], tuple(index.get("offset") or ())): info
            for index, info in dict(content["storage_data"]).items()
        }
        tensors: dict[str, StoredTensor] = {}
        objects = []
        for key, about in content["state_dict_metadata"].items():
            if about.kind.name == "TensorStorageMetadata":
                tensors[key] = stored_tensor(folder, key, about, where)
            else:
                objects.append(key)
        check_files(folder, where)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); the checkpoint is incomplete") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is no checkpoint index ({type(error).__name__}: {error})") from error
    return tensors, objects


def unpickle(data: bytes, where: str) -> Record:
    """The index's records; nothing in the pickle is executed."""

    def refuse(identity: Any) -> None:
        raise ValueError(f"unexpected persistent id {identity!r:.100}")

    constructors: dict[Global, Constructor] = {
        kind: (lambda *arguments, kind=kind: Record(kind, arguments)) for kind in RECORDS
    }
    constructors[Global("torch", "Size")] = lambda sizes=(): tuple(sizes)
    constructors[Global("torch.serialization", "_get_layout")] = str
    values = {Global("torch", name): dtype for name, dtype in DTYPES.items()}
    found = PickleMachine(constructors, refuse, values, {}).run(data, where)
    if not isinstance(found, Record) or found.kind.name != "Metadata":
        raise TypeError(f"a {type(found).__name__}, expected Metadata")
    return found


def stored_tensor(folder: Path, key: str, about: Record, where: Mapping[tuple, Record]) -> StoredTensor:
    """One tensor; `InputError` when its chunks do not make it up."""
    shape = tuple(about["size"])
    dtype = about["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{key} has type {dtype!r:.60}")
    chunks: dict[tuple[int, ...], Chunk] = {}
    for one in about["chunks"]:
        offsets, sizes = tuple(one["offsets"]), tuple(one["sizes"])
        info = where[key, offsets]
        file = info["relative_path"]
        if Path(file).name != file:
            raise InputError(f"{folder / METADATA}: file {file!r} of {key} lies outside the folder; refused")
        if info.get("transform_descriptors"):
            raise InputError(f"{folder}: {key} is stored compressed, which cannot be read; save it without")
        if len(offsets) != len(shape) or any(
            start < 0 or size < 0 or start + size > end for start, size, end in zip(offsets, sizes, shape, strict=True)
        ):
            raise ValueError(f"{key}: a chunk at {offsets} of {sizes} in {shape}")
        chunks[offsets] = Chunk(offsets, sizes, folder / file, info["offset"], info["length"])
    held = sum(math.prod(chunk.sizes) for chunk in chunks.values())
    if held != math.prod(shape):
        raise InputError(f"{folder}: the chunks of {key} hold {held} of {math.prod(shape)} values; incomplete")
    return StoredTensor(dtype, shape, tuple(chunks.values()))


def check_files(folder: Path, where: Mapping[tuple, Record]) -> None:
    """`InputError` when a file is missing or shorter than what lies in it, tensors and other objects."""
    needed: dict[str, int] = {}
    for info in where.values():
        file = info["relative_path"]
        needed[file] = max(needed.get(file, 0), info["offset"] + info["length"])
    for file, size in needed.items():
        path = folder / file
        if not path.is_file():
            raise InputError(f"{path}: no such file, but {METADATA} lists it; the checkpoint is incomplete")
        if path.stat().st_size < size:
            raise InputError(f"{path}: has {path.stat().st_size} bytes, {METADATA} asks for {size}; truncated")
