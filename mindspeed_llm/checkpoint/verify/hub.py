"""The tensors of an HF folder as transformers understands them: read by the safetensors library, never through our
weight tables and readers, so that a mistake of ours cannot hide in the reference.

Quantised tensors (FP8 blocks, MXFP4) are dequantised by transformers' own functions, to bfloat16.
"""

import json
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from mindspeed_llm.errors import InputError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BIN_INDEX, BIN = "pytorch_model.bin.index.json", "pytorch_model.bin"
FP8_SCALE = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
SCALES_OF_ACTIVATIONS = (".activation_scale", ".input_scale")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Stored(NamedTuple):
    """Where a tensor lies, and of what shape and type it is once read."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class HubTensors:
    """The weights of an HF folder under its own names."""

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            InputError: the folder holds no weights, or quantised ones that transformers does not read here.
        """
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.method = (self.config.get("quantization_config") or {}).get("quant_method")
        self.stored: dict[str, Stored] = {}
        self.packed: dict[str, tuple[str, str]] = {}  # dequantised name -> its values and scales
        self.lock = threading.Lock()
        self.kept: tuple[str, torch.Tensor] | None = None  # the tensor dequantised last, which is read in pieces
        for file in weight_files(folder):
            self.stored.update(headers(file))
        self.find_packed()

    def find_packed(self) -> None:
        """Show quantised tensors under the names and shapes they have once dequantised."""
        for name in [name for name in self.stored if name.endswith(SCALES_OF_ACTIVATIONS)]:
            del self.stored[name]
        for name in list(self.stored):
            values = name.removesuffix(FP8_SCALE)
            if name.endswith(FP8_SCALE) and values in self.stored:
                self.packed[values] = (values, name)
            elif name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + SCALES in self.stored:
                plain = name.removesuffix(BLOCKS)
                self.packed[plain] = (name, plain + SCALES)
        self.files = {name: one.file for name, one in self.stored.items()}
        for name, (values, scales) in self.packed.items():
            file, shape, _ = self.stored[values]
            if name != values:  # [experts, rows, groups, 16 bytes of two values] -> [experts, 32 x groups, rows]
                shape = (shape[0], 32 * shape[2], shape[1])
            self.stored.pop(scales), self.stored.pop(values)
            self.stored[name] = Stored(file, shape, torch.bfloat16)

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """In elements."""
        return self.stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values `read` returns."""
        return self.stored[name].dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Entries `start` to `stop` along the first dimension; the whole tensor by default."""
        if name not in self.packed:
            return self.plain(name, start, stop)
        with self.lock:  # transformers reads tensors in several threads
            if self.kept is None or self.kept[0] != name:
                self.kept = name, self.dequantised(name)
            return self.kept[1][start:stop]

    def plain(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """A tensor as it is stored."""
        file = self.files[name]
        if file.suffix == ".bin":
            values = torch.load(file, map_location="cpu", mmap=True, weights_only=True)[name]
            return values[start:stop].clone() if values.dim() else values.clone()
        with safe_open(file, "pt") as opened:
            part = opened.get_slice(name)
            return part[start:stop] if part.get_shape() else opened.get_tensor(name)

    def dequantised(self, name: str) -> torch.Tensor:
        """A quantised tensor in bfloat16, by transformers' functions."""
        values, scales = (self.plain(part) for part in self.packed[name])
        if name != self.packed[name][0]:
            from transformers.integrations.mxfp4 import convert_moe_packed_tensors

            return convert_moe_packed_tensors(values, scales).contiguous()
        from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

        if scales.dtype == torch.uint8:  # exponents of 2, plus 127
            scales = torch.exp2(scales.float() - 127)
        block = (
            list(values.shape[-2:]) if scales.numel() == 1 else self.config["quantization_config"]["weight_block_size"]
        )
        grid = scales.float().reshape(1, 1) if scales.numel() == 1 else scales.float()
        return _dequantize_fp8_weight(values, grid, block, torch.float32).to(torch.bfloat16)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights; `InputError` when there are none."""
    for index, single in ((INDEX, SINGLE), (BIN_INDEX, BIN)):
        if (folder / index).is_file():
            shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / shard for shard in sorted(set(shards))]
        if (folder / single).is_file():
            return [folder / single]
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not found:
        raise InputError(f"{folder}: no weights to compare with")
    return found


def has_weights(folder: Path | None) -> bool:
    """Whether a folder is an HF model with its weights."""
    if folder is None or not (folder / "config.json").is_file():
        return False
    try:
        return bool(weight_files(folder))
    except InputError:
        return False


def headers(file: Path) -> dict[str, Stored]:
    """Name, shape and type of a file's tensors."""
    if file.suffix == ".bin":
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        return {name: Stored(file, tuple(one.shape), one.dtype) for name, one in tensors.items()}
    found = {}
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (not a dictionary)
            part = opened.get_slice(name)
            dtype = DTYPES.get(part.get_dtype(), torch.uint8)
            found[name] = Stored(file, tuple(part.get_shape()), dtype)
    return found
