"""Products of a few rows each with a matrix of their own (experts), by one kernel where a device has one.

Shapes: n rows in g groups, one behind the other; i columns in, o columns out.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [n, i], factors [g, i, o], where each group ends [g], int32, on the device) -> [n, o]."""
ALIGNMENT = 16
"""Bytes to which the rows of every operand of torch's kernel must be aligned."""


class GroupedProducts:
    """Products of groups of rows, one matrix product after another into one tensor.

    On a CPU this is as fast as torch's own grouped product, which does the same (benchmarks/notes.md).
    """

    def row_multiple(self, dtype: torch.dtype) -> int:
        """To which multiple of rows groups should be filled up with zeros, for speed."""
        return 1

    def lay_out(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Move the factors of all groups, of one shape, to where products are fastest; here they stay."""

    def products(
        self, rows: Tensor, factors: Sequence[Tensor], sizes: Sequence[int], add_to: Tensor | None = None
    ) -> Tensor:
        """Each group's rows times its factor.

        Args:
            rows: [n, i].
            factors: g of [i, o].
            sizes: rows of each group, on the host; their sum is n. Groups may be empty.
            add_to: [n, o] to add the products to, in place; without, a new tensor holds them.

        Returns:
            [n, o].
        """
        out = rows.new_empty(rows.size(0), factors[0].size(1)) if add_to is None else add_to
        for part, factor, result in zip(rows.split(sizes), factors, out.split(sizes), strict=True):
            if add_to is None:
                torch.mm(part, factor, out=result)
            else:
                result.addmm_(part, factor)
        return out

    def outer(self, left: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
        """Sums of the rows' outer products, group by group: left [n, i], right [n, o] -> [g, i, o]; 0 of no rows."""
        out = left.new_empty(len(sizes), left.size(1), right.size(1))
        for one, other, result in zip(left.split(sizes), right.split(sizes), out, strict=True):
            torch.mm(one.t(), other, out=result)
        return out


class KernelProducts(GroupedProducts):
    """All groups in one call of a device's kernel, for operands it takes; the others one after another.

    Written from the kernels' documentation; run on no card so far.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def lay_out(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """One behind the other in one storage, so that the kernel takes them as they lie."""
        first = parameters[0]
        whole = torch.empty(len(parameters), *first.shape, dtype=first.dtype, device=first.device)
        for place, parameter in zip(whole, parameters, strict=True):
            place.copy_(parameter.data)
            parameter.data = place

    def products(
        self, rows: Tensor, factors: Sequence[Tensor], sizes: Sequence[int], add_to: Tensor | None = None
    ) -> Tensor:
        """As `GroupedProducts.products`."""
        if not rows.size(0) or not takes(rows) or not takes(factors[0]):
            return super().products(rows, factors, sizes, add_to)
        ends = torch.tensor(sizes).cumsum(0).to(rows.device, torch.int32, non_blocking=True)
        found = self.kernel(rows, stacked(factors), ends)
        return found if add_to is None else add_to.add_(found)


def takes(operand: Tensor) -> bool:
    """Whether a matrix is of a type and a width that kernels for 16-bit types take."""
    aligned = all(size * operand.element_size() % ALIGNMENT == 0 for size in operand.shape[-1:])
    wide = max(operand.stride()) * operand.element_size() % ALIGNMENT == 0
    return operand.dtype in (torch.bfloat16, torch.float16) and aligned and wide


def stacked(factors: Sequence[Tensor]) -> Tensor:
    """[g, i, o] of matrices: a view where they lie at equal distances in one storage (`lay_out`), else a copy."""
    first = factors[0]
    storage, start = first.untyped_storage().data_ptr(), first.storage_offset()
    step = factors[1].storage_offset() - start if len(factors) > 1 else first.numel()
    together = step >= first.numel() and all(
        one.untyped_storage().data_ptr() == storage
        and one.storage_offset() == start + number * step
        and one.stride() == first.stride()
        for number, one in enumerate(factors)
    )
    if not together:
        return torch.stack(list(factors))
    return first.as_strided((len(factors), *first.shape), (step, *first.stride()), start)


def torch_kernel(rows: Tensor, factors: Tensor, ends: Tensor) -> Tensor:
    """torch's grouped product; see `Kernel`."""
    return torch.nn.functional.grouped_mm(rows, factors, offs=ends)
