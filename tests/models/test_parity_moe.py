"""Families with experts and with latent attention: fp32 logits equal to transformers'."""

import pytest
import torch

from tests.distributed.pool import pool
from tests.models.tiny_moe import EVERY, Tiny, reference, saved, tokens

TOLERANCE = 1e-5


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits agree within `TOLERANCE` of their scale, which is not small."""
    scale = float(expected.std())
    assert scale >= 0.5
    assert float((found - expected).abs().max()) <= TOLERANCE * max(1.0, scale)


@pytest.mark.parametrize("one", EVERY, ids=str)
def test_logits_equal_those_of_transformers(one: Tiny) -> None:
    ids = tokens()
    (found,) = pool(1).run("tests.models.moe_worker:logits", folder=saved(one), ids=ids.numpy())
    check(torch.from_numpy(found), reference(one, ids))
