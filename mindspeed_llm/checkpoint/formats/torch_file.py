"""torch's zip checkpoint files, read without executing anything and without loading tensors; and written.

A file is a zip archive with stored (uncompressed) members `<name>/data.pkl`, `<name>/data/<key>` (one storage each),
`<name>/byteorder`. The pickle refers to storages by persistent ids, so every tensor has an offset in the file.
"""

import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, element_count
from mindspeed_llm.checkpoint.formats.pickle_machine import Constructor, Global, PickleMachine
from mindspeed_llm.errors import InputError

DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "double", "float32", "float", "float16", "half", "bfloat16", "int64", "long", "int32", "int",
        "int16", "short", "int8", "uint8", "bool", "uint16", "uint32", "uint64", "complex64",
        "float8_e4m3fn", "float8_e5m2",
    )
    if hasattr(torch, name)
}  # fmt: skip
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "UntypedStorage": torch.uint8,
}  # fmt: skip
NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")


class Storage(NamedTuple):
    """One storage member: where its bytes begin in the file, how many there are, and their type."""

    offset: int
    nbytes: int
    dtype: torch.dtype


class NumpyType:
    """A numpy dtype being rebuilt: the type string, then its byte order by BUILD."""

    def __init__(self, code: str) -> None:
        """Only plain numeric codes ("f8", "u4", "b1"); object arrays would hold pickles."""
        self.dtype = np.dtype(code)
        if self.dtype.hasobject:
            raise ValueError("numpy object arrays are not accepted")


class NumpyArray:
    """A numpy array being rebuilt; BUILD replaces it by the array."""


def build_numpy_type(target: NumpyType, state: Any) -> NumpyType:
    """Apply the byte order of a dtype's state."""
    if state[1] in ("<", ">"):
        target.dtype = target.dtype.newbyteorder(state[1])
    return target


def build_numpy_array(target: NumpyArray, state: Any) -> np.ndarray:
    """The array of a state (version, shape, dtype, fortran, bytes)."""
    _, shape, kind, fortran, data = state
    if not isinstance(data, bytes):
        raise ValueError("a numpy array whose data is not bytes")
    return np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C").copy()


def numpy_from_buffer(data: bytes, kind: NumpyType, shape: tuple[int, ...], order: str) -> np.ndarray:
    """The array of pickle protocol 5's form."""
    return np.frombuffer(bytes(data), kind.dtype).reshape(shape, order="F" if order == "F" else "C").copy()


def read_torch_file(path: str | Path) -> Any:
    """The object in a torch file; tensors come as `LazyTensor`, unknown classes as `Inert`, numpy values as numpy.

    Raises:
        InputError: missing, truncated, not a torch zip file (older torch wrote plain pickles), or broken.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise InputError(f"{path}: a zip file without a data.pkl; not a torch checkpoint")
            prefix = pickles[0][: -len("data.pkl")]
            order = members.get(prefix + "byteorder")
            if order is not None and archive.read(order) != b"little":
                raise InputError(
                    f"{path}: big-endian values are not supported; save it again on a little-endian machine"
                )
            data = archive.read(pickles[0])
            return PickleReader(path, raw, prefix, members).run(data)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise InputError(
            f"{path}: not a complete torch zip file ({error}); truncated, or written by torch before 1.6 (save again)"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


class PickleReader:
    """Runs the pickle of one open torch file."""

    def __init__(self, path: Path, raw: Any, prefix: str, members: Mapping[str, zipfile.ZipInfo]) -> None:
        """Prepare; `raw` is the open file, `prefix` the folder inside the archive."""
        self.path = path
        self.raw = raw
        self.prefix = prefix
        self.members = members
        self.size = os.fstat(raw.fileno()).st_size

    def run(self, data: bytes) -> Any:
        """The object of the pickle `data`."""
        values: dict[Global, Any] = {Global("torch", name): dtype for name, dtype in DTYPES.items()}
        constructors: dict[Global, Constructor] = {
            Global("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            Global("torch._utils", "_rebuild_tensor_v3"): self.tensor_with_dtype,
            Global("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            Global("torch", "Size"): lambda sizes=(): tuple(sizes),
            Global("torch", "device"): lambda *parts: ":".join(map(str, parts)),
            Global("numpy", "dtype"): lambda code, *_: NumpyType(code),
        }
        for module in NUMPY_MODULES:
            constructors[Global(module, "_reconstruct")] = lambda *_: NumpyArray()
            constructors[Global(module, "scalar")] = lambda kind, data: np.frombuffer(data, kind.dtype)[0]
        for module in ("numpy.core.numeric", "numpy._core.numeric"):
            constructors[Global(module, "_frombuffer")] = numpy_from_buffer
        build = {NumpyType: build_numpy_type, NumpyArray: build_numpy_array}
        return PickleMachine(constructors, self.storage, values, build).run(data, str(self.path))

    def storage(self, identity: Any) -> Storage:
        """The storage of a persistent id ("storage", type, key, location, elements)."""
        tag, kind, key, _, elements = identity
        if tag != "storage" or not isinstance(kind, Global) or kind.name not in STORAGES:
            raise ValueError(f"unexpected persistent id {identity!r:.100}")
        dtype = STORAGES[kind.name]
        info = self.members.get(f"{self.prefix}data/{key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{self.path}: storage {key} is missing or compressed; broken or truncated file")
        self.raw.seek(info.header_offset)
        header = self.raw.read(LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise InputError(f"{self.path}: storage {key} has no header; broken or truncated file")
        *_, name_length, extra_length = LOCAL_HEADER.unpack(header)
        offset = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        nbytes = elements * dtype.itemsize
        if nbytes > info.file_size or offset + nbytes > self.size:
            raise InputError(f"{self.path}: storage {key} needs {nbytes} bytes, the file has fewer; truncated")
        return Storage(offset, nbytes, dtype)

    def tensor(self, storage: Storage, offset: int, shape: Any, stride: Any, *_: Any) -> LazyTensor:
        """`_rebuild_tensor_v2`: a view of a storage, in elements of the storage's type."""
        return self.view(storage, storage.dtype, offset, tuple(shape), tuple(stride))

    def tensor_with_dtype(
        self,
        storage: Storage,
        offset: int,
        shape: Any,
        stride: Any,
        _grad: bool,
        _hooks: Any,
        dtype: torch.dtype,
        *_: Any,
    ) -> LazyTensor:
        """`_rebuild_tensor_v3`: the same with an explicit element type over untyped bytes."""
        return self.view(storage, dtype, offset, tuple(shape), tuple(stride))

    def view(
        self, storage: Storage, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> LazyTensor:
        """A tensor over a storage; refused when it would reach outside."""
        if len(shape) != len(stride) or min((*shape, *stride, offset), default=0) < 0:
            raise ValueError(f"a tensor of shape {shape} and stride {stride}")
        span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        last = offset + (span if element_count(shape) else 0)
        if last * dtype.itemsize > storage.nbytes:
            raise InputError(f"{self.path}: a tensor of shape {shape} reaches beyond its storage; broken file")
        return LazyTensor(self.path, storage.offset + offset * dtype.itemsize, dtype, shape, stride)


def materialise(value: Any) -> Any:
    """A copy of a structure from `read_torch_file` with every `LazyTensor` read into memory."""
    if isinstance(value, LazyTensor):
        return value.read()
    if isinstance(value, dict):
        return {key: materialise(item) for key, item in value.items()}
    if isinstance(value, list):
        return [materialise(item) for item in value]
    if type(value) is tuple:
        return tuple(materialise(item) for item in value)
    return value


def write_torch_file(path: str | Path, content: Any) -> None:
    """Write with `torch.save` and make it durable.

    Torch's default pickle protocol 2 is kept: it is the only one torch's own weights-only loader reads.
    """
    with Path(path).open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def write_skeleton(path: str | Path, content: Any) -> Any:
    """Write a torch file whose tensors have place but no values yet; they are written at their offsets afterwards.

    The tensors in `content` need shape and dtype only (`torch.empty`, never touched, costs no memory). So the memory
    a checkpoint takes to write is that of one tensor, not of the file.

    Returns:
        The structure as `read_torch_file` gives it: each tensor a `LazyTensor` that knows its offset.
    """
    with torch.serialization.skip_data():
        torch.save(content, str(path))
    return read_torch_file(path)
