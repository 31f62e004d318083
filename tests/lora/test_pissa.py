"""PiSSA's factors: the best approximation, and ranks that a matrix does not have."""

import pytest
import torch

from mindspeed_llm.errors import UsageError
from mindspeed_llm.lora.pissa import principal_factors


def weight() -> torch.Tensor:
    """[12, 16] with five rows that are adapted."""
    drawn = torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
    return torch.where((torch.arange(12) < 5)[:, None], drawn, 0.0)


def test_factors_of_full_rank_give_the_matrix_and_leave_other_rows_zero() -> None:
    a, b = principal_factors(weight(), 5, 2.0)
    assert (2.0 * b @ a - weight()).abs().max() <= 1e-5 and not b[5:].any()


def test_a_rank_above_the_adapted_rows_is_refused() -> None:
    with pytest.raises(UsageError, match="5 adapted rows of 16 columns have 5 singular vectors, --lora-r asks for 6"):
        principal_factors(weight(), 6, 2.0)
