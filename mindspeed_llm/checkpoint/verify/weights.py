"""Tensor by tensor: is every HF tensor of the result what it has to be, and is any of its values no number?"""

import math
import re
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.formats.lazy import element_count
from mindspeed_llm.checkpoint.verify.exact import total
from mindspeed_llm.checkpoint.verify.view import HfDeltas, HfTensors, Wanted, blocks

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass
class Row:
    """One HF tensor.

    Attributes:
        name: as the HF folder has it.
        verdict: "equal" (bit for bit), "rounded" (a merged value between two right ones is the other one), "left out"
            (as asked), or what is wrong: "differs", "missing", "extra", "shape", "type".
        elements: of the tensor.
        differing: elements that are neither right value.
        rounded: elements where two values are right and the result has the one farther away.
        largest: of |difference from the right value|.
        nonfinite: NaN and Inf in the result.
        note: about values: "all zero", "constant"; empty for ordinary ones.
        shape, dtype: of the result's tensor.
        wanted_shape, wanted_dtype: what they have to be.
    """

    name: str
    verdict: str = "equal"
    elements: int = 0
    differing: int = 0
    rounded: int = 0
    largest: float = 0.0
    nonfinite: int = 0
    note: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    wanted_shape: tuple[int, ...] = ()
    wanted_dtype: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is what it has to be."""
        return self.verdict in ("equal", "rounded", "left out") and not self.nonfinite

    def badness(self) -> tuple[bool, float, int]:
        """The worst row has the greatest."""
        largest = self.largest if self.largest == self.largest else float("inf")
        return not self.passed, largest, self.rounded

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "passed": self.passed}


def compare_weights(wanted: Wanted, found: HfTensors, left_out: Set[str] = frozenset()) -> list[Row]:
    """One row for each tensor that has to be there or is.

    Args:
        left_out: tensors the command asked to leave out.
    """
    there = set(found.names())
    rows = []
    for name in wanted.names():
        if name in there:
            rows.append(compare_tensor(name, wanted, found))
        else:
            rows.append(Row(name, "left out" if name in left_out else "missing", wanted_shape=wanted.shape(name)))
    known = set(wanted.names())
    rows += [Row(name, "extra", shape=found.shape(name)) for name in found.names() if name not in known]
    return rows


def compare_tensor(name: str, wanted: Wanted, found: HfTensors) -> Row:
    """The row of a tensor both sides have, read block by block."""
    shape, dtype = wanted.shape(name), wanted.dtype(name)
    row = Row(name, elements=element_count(shape), shape=found.shape(name), dtype=plain(found.dtype(name)))
    row.wanted_shape, row.wanted_dtype = shape, plain(dtype)
    if row.shape != shape:
        row.verdict = "shape"
        return row
    lowest, highest = float("inf"), float("-inf")
    for start, stop in blocks(shape):
        right, values = wanted.right(name, start, stop), found.read(name, start, stop)
        if values.dtype != dtype:
            row.verdict, values = "type", values.to(dtype)
        least, greatest = float(values.min()), float(values.max())  # a NaN is both
        if not math.isfinite(least) or not math.isfinite(greatest):
            row.nonfinite += int((~torch.isfinite(values)).sum())
        lowest, highest = min(lowest, least), max(highest, greatest)
        if same_bits(values, right.nearest):
            continue
        inside = (values >= right.low) & (values <= right.high)
        away = differing_bits(values, right.nearest) if same_bits(right.low, right.high) else values != right.nearest
        wrong = away if same_bits(right.low, right.high) else ~inside
        row.differing += int(wrong.sum())
        row.rounded += int((away & ~wrong).sum())
        difference = (values.double() - right.nearest.double()).abs().max()
        row.largest = max(row.largest, float(difference)) if difference == difference else float("nan")
    if lowest == highest and row.elements > 1:
        row.note = "all zero" if lowest == 0 else "constant"
    if row.verdict == "equal" and row.differing:
        row.verdict = "differs"
    elif row.verdict == "equal" and row.rounded:
        row.verdict = "rounded"
    return row


def compare_deltas(
    base: HfTensors, wanted: Sequence[HfDeltas], found: HfDeltas, params_dtype: str | None = None
) -> list[Row]:
    """One row for each HF tensor that either adapter changes.

    Factors may be divided and joined, and a ratio of scalings taken into one of them: equal are products within a few
    float32 steps, or steps of the type the factors were cast to.
    """
    step = {None: 8 * 2.0**-24, "fp32": 8 * 2.0**-24, "fp16": 2.0**-9, "bf16": 2.0**-6}[params_dtype]
    rows = []
    for name in base.names():
        row, touched = Row(name, elements=element_count(base.shape(name)), shape=base.shape(name)), False
        for start, stop in blocks(base.shape(name)):
            ours = total([one for adapter in wanted if (one := adapter.delta(name, start, stop)) is not None])
            theirs = found.delta(name, start, stop)
            if ours is None and theirs is None:
                continue
            touched = True
            present = ours or theirs
            zero = torch.zeros_like(present.value)
            difference = ((ours.value if ours else zero) - (theirs.value if theirs else zero)).abs()
            row.differing += int((~(difference <= step * present.scale)).sum())
            row.largest = max(row.largest, float(difference.max()))
        if touched:
            row.verdict = "differs" if row.differing else "equal"
            rows.append(row)
    return rows


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit: a NaN equals itself, -0 is not 0."""
    return one is other or torch.equal(as_bits(one), as_bits(other))


def differing_bits(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors differ, as booleans."""
    return as_bits(one) != as_bits(other)


def as_bits(values: Tensor) -> Tensor:
    """The same bytes as integers."""
    return values.contiguous().view(BITS[values.dtype.itemsize])


def plain(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def prediction_tensors(names: list[str], num_layers: int) -> set[str]:
    """Those of layers beyond the decoder's, which predict further tokens."""
    return {name for name in names if (match := LAYER.search(name)) and int(match[1]) >= num_layers}
