"""The algebra of weights: how a logical tensor relates to its parts. Pure: integers and tensors, no files.

Both relations a weight has are the same thing, an `AxisMap`: along one dimension the logical tensor is a sequence of
segments, each lying in one *part*. Parts are the HF tensors (q, k, v) or the tensor-parallel ranks. From the map
follow both directions: a part is the logical tensor read at `part_ranges(part)`; the logical tensor, or any range of
it, is the parts read at `locate(ranges)`.

    HF q, k, v          logical linear_qkv           ranks (TP 2)
    q0 q1 q2 q3   <->   q0 q1 k0 v0 q2 q3 k1 v1  <->  [q0 q1 k0 v0] [q2 q3 k1 v1]
    gate, up      <->   gate ... up ...          <->  [gate/2 up/2] [gate/2 up/2]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mindspeed_llm.errors import UsageError
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families.base import Join, Kind

Ranges = Sequence[tuple[int, int]]
"""Half-open ranges [start, stop) along one dimension."""


class Segment(NamedTuple):
    """`length` consecutive places of the logical axis, lying at `start` of part `part`."""

    part: int
    start: int
    length: int


@dataclass(frozen=True)
class AxisMap:
    """How parts make up a logical tensor along `dim`.

    Attributes:
        dim: the dimension cut; None when every part holds the whole tensor.
        segments: in logical order.
        padding: for each part, how many copies of the logical tensor's last row follow its own rows.
    """

    dim: int | None
    segments: tuple[Segment, ...]
    padding: tuple[int, ...]

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return len(self.padding)

    def part_ranges(self, part: int) -> list[tuple[int, int]]:
        """Logical ranges that, joined in this order, are `part` without its padding (not for whole copies)."""
        found, logical = [], 0
        for segment in self.segments:
            if segment.part == part:
                found.append((segment.start, logical, logical + segment.length))
            logical += segment.length
        return merge_ranges([(start, stop) for _, start, stop in sorted(found)])

    def part_size(self, part: int) -> int:
        """Length of `part` along `dim`, padding included."""
        return sum(one.length for one in self.segments if one.part == part) + self.padding[part]

    def locate(self, ranges: Ranges | None = None) -> list[tuple[int, int, int]]:
        """Where logical `ranges` (all of it when None) lie: (part, start, stop) in logical order."""
        total = sum(segment.length for segment in self.segments)
        places: list[tuple[int, int, int]] = []
        for start, stop in [(0, total)] if ranges is None else ranges:
            logical = 0
            for segment in self.segments:
                low = max(start, logical)
                high = min(stop, logical + segment.length)
                if low < high:
                    offset = segment.start - logical
                    places.append((segment.part, low + offset, high + offset))
                logical += segment.length
        return merge_places(places)


def merge_ranges(ranges: Ranges) -> list[tuple[int, int]]:
    """Join ranges that touch, keeping the order: fewer, longer reads."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def merge_places(places: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Join places that touch in the same part, keeping the order."""
    merged: list[tuple[int, int, int]] = []
    for part, start, stop in places:
        if merged and merged[-1][0] == part and merged[-1][2] == start:
            merged[-1] = (part, merged[-1][1], stop)
        else:
            merged.append((part, start, stop))
    return merged


def whole_copies(parts: int) -> AxisMap:
    """The map of a tensor every part holds all of."""
    return AxisMap(None, (), (0,) * parts)


def hf_map(join: Join, config: ModelConfig, size: int) -> AxisMap:
    """How a logical tensor of `size` rows is made of its HF tensors (the parts, along dimension 0)."""
    groups, head = config.num_query_groups, config.kv_channels
    heads = config.num_attention_heads // groups
    if join is Join.QKV:
        return AxisMap(0, tuple(query_groups(groups, heads, head)), (0, 0, 0))
    if join is Join.STACKED_QKV:
        above = (0, groups * heads * head, (groups * heads + groups) * head)
        found = query_groups(groups, heads, head)
        return AxisMap(0, tuple(Segment(0, above[one.part] + one.start, one.length) for one in found), (0,))
    half = size // 2
    if join is Join.GATED:
        return AxisMap(0, (Segment(0, 0, half), Segment(1, 0, half)), (0, 0))
    if join is Join.INTERLEAVED:
        return AxisMap(0, tuple(Segment(0, 2 * row + part, 1) for part in (0, 1) for row in range(half)), (0,))
    return AxisMap(0, (Segment(0, 0, size),), (0,))


def query_groups(groups: int, heads: int, head: int) -> list[Segment]:
    """Segments of q, k, v (parts 0, 1, 2): for each group its `heads` query heads, one key head, one value head."""
    segments = []
    for group in range(groups):
        segments.append(Segment(0, group * heads * head, heads * head))
        segments += [Segment(part, group * head, head) for part in (1, 2)]
    return segments


def shard_map(
    name: str, kind: Kind, config: ModelConfig, shape: Sequence[int], tp: int, padded_rows: int | None = None
) -> AxisMap:
    """How `tp` ranks (the parts) share a logical tensor.

    Args:
        name: the tensor's name, for the error.
        shape: logical shape.
        padded_rows: rows of a vocabulary table over all ranks, padding included; the least multiple of `tp` when None.

    Raises:
        UsageError: the size does not divide.
    """
    if kind is Kind.REPLICATED:
        return whole_copies(tp)
    if kind is Kind.VOCAB:
        return vocabulary_map(name, shape[0], tp, padded_rows)
    if kind is Kind.GATED:
        half = even_share(name, "ffn_hidden_size", shape[0] // 2, tp)
        both = [Segment(rank, part * half, half) for part in (0, 1) for rank in range(tp)]
        return AxisMap(0, tuple(both), (0,) * tp)
    dim = 1 if kind is Kind.ROW else 0
    if kind is Kind.QKV:
        even_share(name, "num_query_groups", config.num_query_groups, tp)
    share = even_share(name, f"dimension {dim}", shape[dim], tp)
    return AxisMap(dim, tuple(Segment(rank, 0, share) for rank in range(tp)), (0,) * tp)


def even_share(name: str, what: str, size: int, tp: int) -> int:
    """`size / tp`, or a `UsageError` naming both when it does not divide."""
    if size % tp:
        raise UsageError(
            f"{name}: {what} {size} is not divisible by tensor parallel size {tp}; choose a divisor of {size}"
        )
    return size // tp


def vocabulary_map(name: str, rows: int, tp: int, padded_rows: int | None) -> AxisMap:
    """Equal blocks of a vocabulary table; ranks beyond the last row hold copies of it."""
    padded = -(-rows // tp) * tp if padded_rows is None else padded_rows
    if padded < rows or padded % tp:
        raise UsageError(
            f"{name}: a padded vocabulary of {padded} rows does not hold {rows} rows in {tp} equal shares;"
            f" choose a multiple of {tp} that is at least {rows}"
        )
    share = padded // tp
    own = [max(0, min(rows, (rank + 1) * share) - rank * share) for rank in range(tp)]
    segments = tuple(Segment(rank, 0, count) for rank, count in enumerate(own) if count)
    return AxisMap(0, segments, tuple(share - count for count in own))


def padded_vocabulary(rows: int, tp: int, divisible_by: int = 1) -> int:
    """Megatron's rule: the least multiple of `divisible_by * tp` that holds `rows`."""
    unit = divisible_by * tp
    return -(-rows // unit) * unit


def adapter_map(base: AxisMap, factor: str) -> AxisMap:
    """How ranks share a LoRA factor of a weight that they share by `base`.

    `lora_A` [r, in] is cut like the columns of the base, `lora_B` [out, r] and lengths [out] like its rows; a factor
    along which the base is not cut is held whole by every rank.
    """
    cut = 1 if factor.startswith("lora_A") else 0
    return base if base.dim == cut else whole_copies(base.parts)
