"""The comparison of `test_moe_layouts.py` notices what it is there to notice: each planted fault makes it fail.

The faults with a number are megatron-core's own (`docs/layouts.md`): they also show that its defect is still there.
"""

from dataclasses import replace

import pytest

from tests.distributed.cases import Case
from tests.distributed.compare import assert_exact, results
from tests.distributed.test_moe_layouts import CUT, PADDED, SP, VPP, moe

ETP1 = {"world": 2, "expert_tensor": 1, **SP}
SPREAD = {"expert": 2, **ETP1}
PLANTED = {
    "3: experts in the dense group": (moe(**ETP1), "experts-in-dense-group", "gradients .*replicas differ"),
    "experts in the dense group, spread": (moe(world=4, expert=2), "experts-in-dense-group", "logits"),
    "a partial factor": (moe(world=2, **SP), "partial-factors-kept", "gradients .*replicas differ"),
    "the norm of half the experts": (moe(**SPREAD), "experts-counted-by-dense-rank", "first gradient norm"),
    "routers of half the tokens": (moe(routers=True, **SPREAD), "routers-of-own-tokens", "router.weight"),
    "gradients not reduced": (moe(world=2, expert=2), "gradient-sync-skipped", "gradient"),
    "balance of half the tokens": (moe(balance=0.3, **SPREAD), "balance-of-own-tokens", "gradient of"),
    "balance of half the sequence": (moe(world=2, context=2, balance=0.3), "balance-of-own-tokens", "gradient of"),
    "2: default messages": (replace(PADDED, context=1, **VPP), "default-messages", "gradient of"),
    "5: a loss of two": (PADDED, "pair-loss", "gradient of"),
    "context: keys and values": (PADDED, "context-gradients-not-summed", "gradient of"),
    "context: not reduced": (PADDED, "gradient-sync-skipped", "replicas differ"),
    "context: other angles": (PADDED, "angles-of-other-positions", "logits"),
    "context: another order": (PADDED, "pieces-in-another-order", "logits"),
    "context: one process sees across rows": (CUT, "bound-crossed-by-one", "logits"),
    "context: all see across rows": (replace(CUT, world=4, **SP), "bound-crossed", "logits"),
    "context: rows' angles": (CUT, "position-reset-late", "logits"),
    "context: rows' keys and values": (CUT, "context-gradients-not-summed", "gradient of"),
    "11: a frozen embedding": (Case(recompute="full"), "embedding-without-gradient", "gradient"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_noticed(name: str) -> None:
    case, fault, where = PLANTED[name]
    reports = results(replace(case, fault=fault, steps=1))
    with pytest.raises(AssertionError, match=where):
        assert_exact(replace(case, fault=fault, steps=1), reports)
