"""Grouped products against one matrix product per group."""

import pytest
import torch
from torch import Tensor, nn

from mindspeed_llm.device.cpu_kernels import GroupedProducts
from mindspeed_llm.device.grouped import KernelProducts, stacked, torch_kernel

SIZES = [3, 0, 5, 1]
FORMS = {"loop": GroupedProducts(), "kernel": KernelProducts(torch_kernel)}


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def one_by_one(rows: Tensor, factors: list[Tensor]) -> Tensor:
    return torch.cat([part.double() @ factor.double() for part, factor in zip(rows.split(SIZES), factors, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("turned", [False, True], ids=["as-is", "transposed"])
def test_every_group_is_multiplied_by_its_own_factor(form: str, dtype: torch.dtype, turned: bool) -> None:
    rows = draw(sum(SIZES), 16, dtype=dtype)
    factors = [draw(8, 16, seed=n, dtype=dtype).t() if turned else draw(16, 8, seed=n, dtype=dtype) for n in range(4)]
    found = FORMS[form].products(rows, factors, SIZES)
    assert (found - one_by_one(rows, factors)).abs().max() <= (1e-6 if dtype == torch.float32 else 8e-3) * 16
    sums = draw(sum(SIZES), 8, seed=9, dtype=dtype)
    given = sums.clone()
    assert FORMS[form].products(rows, factors, SIZES, add_to=given) is given
    assert (given - sums - one_by_one(rows, factors)).abs().max() <= (1e-6 if dtype == torch.float32 else 2e-2) * 16


def test_outer_products_are_summed_group_by_group_and_zero_where_there_are_no_rows() -> None:
    left, right = draw(sum(SIZES), 5), draw(sum(SIZES), 7, seed=2)
    found = GroupedProducts().outer(left, right, SIZES)
    wanted = torch.stack([a.t() @ b for a, b in zip(left.split(SIZES), right.split(SIZES), strict=True)])
    assert torch.allclose(found, wanted, atol=1e-6) and not found[1].any()


def test_parameters_laid_out_for_a_kernel_keep_their_values_and_are_taken_without_a_copy() -> None:
    parameters = [nn.Parameter(draw(4, 8, seed=n)) for n in range(3)]
    values = [one.detach().clone() for one in parameters]
    assert stacked(parameters).data_ptr() != parameters[0].data_ptr()
    KernelProducts(torch_kernel).lay_out(parameters)
    for turn in (lambda one: one, lambda one: one.t()):
        whole = stacked([turn(one) for one in parameters])
        assert whole.data_ptr() == parameters[0].data_ptr()
        assert torch.equal(whole, torch.stack([turn(one) for one in values]))


def test_only_matrices_at_equal_distances_are_taken_without_a_copy() -> None:
    storage = draw(6, 4, 8)
    for taken in ([0, 1, 3], [2, 1, 0], [0, 0, 0]):
        factors = [storage[number] for number in taken]
        assert torch.equal(stacked(factors), torch.stack(factors))
    assert stacked([storage[0], storage[2], storage[4]]).data_ptr() == storage.data_ptr()


def test_sixteen_bit_groups_are_filled_up_on_a_cpu_and_others_are_not() -> None:
    assert GroupedProducts().row_multiple(torch.bfloat16) == 16
    assert {GroupedProducts().row_multiple(dtype) for dtype in (torch.float32, torch.float64)} == {1}
