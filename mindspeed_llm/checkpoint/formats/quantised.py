"""Quantised hub weights as plain bfloat16 tensors, dequantised box by box as transformers does it.

FP8 (DeepSeek-V3, Qwen3-FP8): `X.weight` in float8 beside `X.weight_scale_inv`, one scale per block of
`quantization_config.weight_block_size`; blocks at the right and lower edge are cut off by the tensor's shape.

MXFP4 (gpt-oss): `X_blocks` uint8 [experts, rows, groups, 16] holds two 4-bit values a byte (the low half first), and
`X_scales` uint8 [experts, rows, groups] the exponent of each group of 32, plus 127. The plain tensor `X` is
[experts, 32 x groups, rows]: transformers transposes it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, check_box, cut_ranges
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.errors import InputError

PLAIN = torch.bfloat16
"""What quantised weights become."""
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_SCALE = "_scale_inv"
ACTIVATION_SCALES = (".activation_scale", ".input_scale")
"""Scales of static activation quantisation; plain weights have no use for them."""
METHODS = ("fp8", "mxfp4")
MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MXFP4_GROUP = 32
"""Values under one scale, and so 16 bytes."""
EXPONENT_BIAS = 127
SLAB = 1 << 22
"""Values dequantised at once: what is in memory besides the result (float32 and integers) stays below 100 MB."""


@dataclass(frozen=True)
class Fp8Tensor:
    """A float8 tensor under block scales (`Readable`).

    Attributes:
        values: float8, [..., rows, columns].
        scales: [..., blocks of rows, blocks of columns], or one value for the whole tensor.
        block: rows and columns under one scale.
    """

    values: LazyTensor
    scales: LazyTensor
    block: tuple[int, int]
    dtype: ClassVar[torch.dtype] = PLAIN

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements."""
        return self.values.shape

    def expert(self, number: int, transposed: bool = False) -> "Fp8Tensor":
        """One expert of a tensor [experts, ...], transposed back where it is stored transposed."""
        block = self.block[::-1] if transposed else self.block
        return Fp8Tensor(self.values.expert(number, transposed), self.scales.expert(number, transposed), block)

    def read(self, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The tensor, or a box of it, in bfloat16: float32 product with the scale, rounded once."""
        check_box(self.values.path, self.shape, rows, columns)
        if len(self.shape) > 2:
            numbers = places(rows, self.shape[0]).tolist()
            return torch.stack([self.expert(number).read(columns) for number in numbers])
        rows = rows if rows is not None else [(0, self.shape[0])]
        columns = columns if columns is not None else [(0, self.shape[1])]
        scales = exact_scales(self.scales.read()).view(self.grid)
        row_blocks = places(rows, self.shape[0]) // self.block[0]
        column_blocks = places(columns, self.shape[1]) // self.block[1]
        result = torch.empty(len(row_blocks), len(column_blocks), dtype=PLAIN)
        whole = len(column_blocks) == self.shape[1]
        for start, stop in slabs(len(row_blocks), len(column_blocks)):
            values = self.values.read(cut_ranges(rows, start, stop), None if whole else columns).to(torch.float32)
            values *= scales[row_blocks[start:stop]][:, column_blocks]
            result[start:stop] = values
        return result

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along rows and columns."""
        return tuple(-(-size // block) for size, block in zip(self.shape[-2:], self.block, strict=True))


@dataclass(frozen=True)
class Mxfp4Matrix:
    """One expert of an MXFP4 tensor (`Readable`).

    Attributes:
        blocks: uint8 [rows, groups, 16].
        scales: uint8 [rows, groups].
        transposed: the matrix shown is [32 x groups, rows], not [rows, 32 x groups].
    """

    blocks: LazyTensor
    scales: LazyTensor
    transposed: bool = False
    dtype: ClassVar[torch.dtype] = PLAIN

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements."""
        rows, groups, _ = self.blocks.shape
        return (MXFP4_GROUP * groups, rows) if self.transposed else (rows, MXFP4_GROUP * groups)

    def read(self, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The matrix, or a box of it; only groups the box touches are read."""
        check_box(self.blocks.path, self.shape, rows, columns)
        if self.transposed:
            return Mxfp4Matrix(self.blocks, self.scales).read(columns, rows).t().contiguous()
        rows = rows if rows is not None else [(0, self.shape[0])]
        columns = columns if columns is not None else [(0, self.shape[1])]
        groups = [(start // MXFP4_GROUP, -(-stop // MXFP4_GROUP)) for start, stop in columns if stop > start]
        wanted = places_within(groups, columns)
        height = sum(stop - start for start, stop in rows)
        read_width = MXFP4_GROUP * sum(stop - start for start, stop in groups)
        result = torch.empty(height, len(wanted), dtype=PLAIN)
        for start, stop in slabs(height, read_width):
            part = cut_ranges(rows, start, stop)
            values = mxfp4_values(self.blocks.read(part, groups), self.scales.read(part, groups))
            result[start:stop] = values if len(wanted) == read_width else values[:, wanted]
        return result


@dataclass(frozen=True)
class Mxfp4Tensor:
    """An MXFP4 tensor as transformers shows it: [experts, 32 x groups, rows] (`Readable`).

    Attributes:
        blocks: uint8 [experts, rows, groups, 16].
        scales: uint8 [experts, rows, groups].
    """

    blocks: LazyTensor
    scales: LazyTensor
    dtype: ClassVar[torch.dtype] = PLAIN

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements."""
        experts, rows, groups, _ = self.blocks.shape
        return (experts, MXFP4_GROUP * groups, rows)

    def expert(self, number: int, transposed: bool = False) -> Mxfp4Matrix:
        """One expert; `transposed` gives [rows, 32 x groups], which is how its bytes lie."""
        return Mxfp4Matrix(self.blocks.expert(number), self.scales.expert(number), not transposed)

    def read(self, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The tensor, or a box of it along its first two dimensions."""
        check_box(self.blocks.path, self.shape, rows, columns)
        numbers = places(rows, self.shape[0]).tolist()
        return torch.stack([self.expert(number).read(columns) for number in numbers])


HfTensor = LazyTensor | Fp8Tensor | Mxfp4Matrix | Mxfp4Tensor
"""A tensor of an HF folder: plain, or dequantised while it is read."""


def exact_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32; bytes are exponents plus 127."""
    if scales.dtype == torch.uint8:
        return (scales.to(torch.float32) - EXPONENT_BIAS).exp2()
    return scales.to(torch.float32)


def mxfp4_values(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dequantise [rows, groups, 16] under [rows, groups] to [rows, 32 x groups]."""
    table = torch.tensor(MXFP4_VALUES, dtype=PLAIN)
    rows, groups, size = blocks.shape
    values = torch.empty(rows, groups, 2 * size, dtype=PLAIN)
    values[..., 0::2] = table[(blocks & 0x0F).to(torch.int)]
    values[..., 1::2] = table[(blocks >> 4).to(torch.int)]
    torch.ldexp(values, (scales.to(torch.int32) - EXPONENT_BIAS).unsqueeze(-1), out=values)
    return values.view(rows, groups * 2 * size)


def places(ranges: Ranges | None, size: int) -> torch.Tensor:
    """Every place of `ranges` (of the whole dimension when None), in order."""
    if ranges is None:
        return torch.arange(size)
    return torch.cat([torch.arange(start, stop) for start, stop in ranges] or [torch.arange(0)])


def places_within(groups: Ranges, columns: Ranges) -> torch.Tensor:
    """Where `columns` lie in the groups that were read for them, one range of groups for each range of columns."""
    found, read = [torch.arange(0)], 0
    for (first, last), (start, stop) in zip(groups, [pair for pair in columns if pair[1] > pair[0]], strict=True):
        found.append(torch.arange(start, stop) - first * MXFP4_GROUP + read)
        read += (last - first) * MXFP4_GROUP
    return torch.cat(found)


def slabs(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that together hold at most `SLAB` values (one row at least)."""
    step = max(1, SLAB // max(1, columns))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def dequantised(
    tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any] | None, where: str
) -> tuple[dict[str, HfTensor], str | None]:
    """The tensors of a folder under their plain names and shapes.

    Args:
        tensors: by name, as stored.
        settings: `quantization_config` of config.json.
        where: the folder, for errors.

    Returns:
        The tensors, and one line that says what is dequantised; None when nothing is.

    Raises:
        InputError: another method, scales without values or values without scales, or shapes that do not fit.
    """
    if settings is not None and not isinstance(settings, dict):
        raise InputError(f"{where}: quantization_config is {settings!r:.60}, expected an object")
    method = (settings or {}).get("quant_method")
    if method is not None and method not in METHODS:
        raise InputError(
            f"{where}: quantised by {method!r}, which cannot be read (known: {', '.join(METHODS)});"
            " give the unquantised weights"
        )
    plain: dict[str, HfTensor] = {}
    counts = {"FP8": 0, "MXFP4": 0}
    dropped = 0
    for name, tensor in tensors.items():
        if name.endswith(FP8_SCALE):
            partner(tensors, name, name.removesuffix(FP8_SCALE), where)
        elif name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in tensors:
            pass
        elif name.endswith("_blocks") and tensor.dtype == torch.uint8:
            base = name.removesuffix("_blocks")
            plain[base] = mxfp4_tensor(tensor, partner(tensors, name, base + "_scales", where), name)
            counts["MXFP4"] += 1
        elif tensor.dtype in FP8:
            scales = partner(tensors, name, name + FP8_SCALE, where)
            plain[name] = Fp8Tensor(tensor, scales, block_size(tensor, scales, settings, name))
            counts["FP8"] += 1
        elif name.endswith(ACTIVATION_SCALES) and method == "fp8":
            dropped += 1
        else:
            plain[name] = tensor
    said = [f"{count} {kind} tensors are dequantised to bfloat16" for kind, count in counts.items() if count]
    if dropped:
        said.append(f"{dropped} activation scales are left out")
    return plain, f"{where}: {', '.join(said)}" if said else None


def partner(tensors: Mapping[str, LazyTensor], name: str, other: str, where: str) -> LazyTensor:
    """The tensor that has to lie beside `name`; `InputError` without it."""
    if other not in tensors:
        raise InputError(f"{where}: {name} is stored without {other}; the folder is incomplete")
    return tensors[other]


def mxfp4_tensor(blocks: LazyTensor, scales: LazyTensor, name: str) -> Mxfp4Tensor:
    """Blocks and their scales; `InputError` when the shapes do not fit."""
    if len(blocks.shape) != 4 or blocks.shape[-1] * 2 != MXFP4_GROUP or blocks.shape[:-1] != scales.shape:
        raise InputError(
            f"{blocks.path}: {name} has shape {list(blocks.shape)}, its scales {list(scales.shape)}; expected"
            f" [experts, rows, groups, {MXFP4_GROUP // 2}] and [experts, rows, groups]"
        )
    return Mxfp4Tensor(blocks, scales)


def block_size(
    values: LazyTensor, scales: LazyTensor, settings: Mapping[str, Any] | None, name: str
) -> tuple[int, int]:
    """Rows and columns under one scale.

    The size config.json names, if as many blocks are stored as it asks for; one block for a single scale; else the
    size that divides the tensor into the blocks that are stored (transformers goes by the stored blocks alone, and so
    misreads or refuses a tensor whose last block is cut off).

    Raises:
        InputError: none of them.
    """
    shape = values.shape[-2:]
    stored = scales.shape[-2:]
    if all(size == 1 for size in scales.shape[len(values.shape) - 2 :]) and len(values.shape) == 2:
        return (max(1, shape[0]), max(1, shape[1]))
    named = (settings or {}).get("weight_block_size")
    if len(stored) == len(shape) == 2 and scales.shape[:-2] == values.shape[:-2]:
        if named and stored == tuple(-(-size // block) for size, block in zip(shape, named, strict=True)):
            return (int(named[0]), int(named[1]))
        if all(count and size % count == 0 for size, count in zip(shape, stored, strict=True)):
            return (shape[0] // stored[0], shape[1] // stored[1])
    raise InputError(
        f"{values.path}: {name} has shape {list(values.shape)} and scales {list(scales.shape)}, which are no blocks of"
        f" {named or 'equal size'}; the folder's config.json belongs to other weights"
    )
