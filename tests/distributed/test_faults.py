"""The comparison of `test_layouts.py` notices what it is there to notice: each planted fault makes it fail."""

from dataclasses import replace

import pytest

from tests.distributed.cases import Case
from tests.distributed.compare import assert_exact, results
from tests.distributed.test_layouts import LAYOUTS, MODULAR, PACKED, SP

FIRST_BATCH = [replace(case, steps=1) for case in (*LAYOUTS, *MODULAR)]


def noticed(cases: list[Case], fault: str, where: str) -> list[pytest.param]:
    """The cases with a fault in them, and what the comparison should find first."""
    return [pytest.param(replace(case, fault=fault), where, id=f"{case}-{fault}") for case in cases]


PARALLEL = [case for case in FIRST_BATCH if case.sequence_parallel]
FUSED_TENSOR = [case for case in FIRST_BATCH if case.tensor > 1 and case.fused]
REPLICATED = [case for case in FIRST_BATCH if case.replicas > 1]
PACKED_ROWS = [replace(case, steps=1) for case in PACKED if case.recompute is None]
PLANTED = [
    *(param for fault in ("bound-crossed", "position-reset-late") for param in noticed(PACKED_ROWS, fault, "logits")),
    *noticed([case for case in FIRST_BATCH if case.fused], "gate-and-up-swapped", "logits"),
    *noticed(PARALLEL, "no-sequence-parallel-mark", "gradients .*replicas differ over TP"),
    *noticed([c for c in FUSED_TENSOR if not c.sequence_parallel], "all-reduce-skipped", "logits"),
    *noticed([c for c in FUSED_TENSOR if c.sequence_parallel], "reduce-scatter-skipped", "logits"),
    *noticed(
        [c for c in REPLICATED if not c.distributed_optimizer], "gradient-sync-skipped", "replicas differ over DP"
    ),
    *noticed([c for c in REPLICATED if c.distributed_optimizer], "gradient-sync-skipped", "gradient of"),
]


@pytest.mark.parametrize(("case", "where"), PLANTED)
def test_a_planted_fault_is_noticed(case: Case, where: str) -> None:
    reports = results(case)
    with pytest.raises(AssertionError, match=where):
        assert_exact(case, reports)


@pytest.mark.parametrize("case", [Case(world=2, tensor=2, steps=1), Case(world=2, steps=1, **SP)], ids=str)
def test_a_sum_skipped_in_the_backward_pass_alone_is_noticed_in_the_gradients(case: Case) -> None:
    broken = replace(case, fault="backward-sum-skipped")
    reports = results(broken)
    with pytest.raises(AssertionError, match="gradient"):
        assert_exact(broken, reports)
