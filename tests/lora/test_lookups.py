"""Adapters of routers and token embeddings: training equals transformers and peft at every layout."""

from dataclasses import replace

import pytest

from tests.distributed.cases import Case
from tests.distributed.compare import assert_exact, gathered, reference_of, results

pytestmark = pytest.mark.distributed
SP = {"tensor": 2, "sequence_parallel": True}
ONE = Case(model="qwen3-moe", lookups=True, steps=2)
LAYOUTS = (
    ONE,
    replace(ONE, balance=0.3, z_loss=0.01, recompute="full", fused=False),
    replace(ONE, world=2, **SP),
    replace(ONE, world=2, expert=2, balance=0.3, z_loss=0.01),
    replace(ONE, world=2, expert=2, expert_tensor=1, balance=0.3, fused=False, **SP),
    replace(ONE, world=2, pipeline=2),
    replace(ONE, world=2, context=2, balance=0.3),
    replace(ONE, world=2, distributed_optimizer=True, overlap=True),
)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_training_routers_and_embeddings_equals_transformers_and_peft(case: Case) -> None:
    reports = results(case)
    assert_exact(case, reports)
    assert [report.frozen_changed for report in reports] == [[]] * case.world
    trained = set(gathered(reports, "trained", case))
    assert trained == set(reference_of(case).trained)
    assert any("router" in name for name in trained) and any("embedding" in name for name in trained)


def test_adapters_whose_gradients_are_not_summed_over_the_tensor_parallel_ranks_are_noticed() -> None:
    case = replace(ONE, world=2, fault="lookups-without-mark", **SP)
    with pytest.raises(AssertionError, match=r"(router|embedding)\S*: replicas differ"):
        assert_exact(case, results(case))
