"""megatron-core 0.16.1 still has the defects that our rules avoid; when one of these fails, its rule may go.

Numbers as in `docs/layouts.md`. 2, 3, 5 and 11 are shown in `test_expert_faults.py`.
"""

from typing import Any

import pytest

from tests.distributed.moe_reference import saved_model
from tests.distributed.pool import pool


def seen(what: str, size: int = 1, model: str = "", **arguments: Any) -> Any:
    """What `defects_worker` saw on rank 0."""
    if model:
        arguments["folder"] = saved_model(model)
    return pool(size).run(f"tests.distributed.defects_worker:{what}", **arguments)[0]


def test_1_its_norm_refuses_sequence_parallelism() -> None:
    assert "AssertionError" in seen("norm")


def test_4_its_schedule_fails_without_a_lowest_rate() -> None:
    assert "TypeError" in seen("schedule")


def test_6_a_configuration_that_knows_the_optimizer_cannot_be_copied_for_experts() -> None:
    assert seen("scale_before_build")


def test_10_its_attention_refuses_context_parallelism() -> None:
    assert "AssertionError" in seen("attention")


def test_14_under_per_token_loss_balance_weighs_by_all_tokens_while_gradients_are_divided_by_the_trained() -> None:
    assert seen("weight_under_per_token_loss", model="qwen3-moe") == pytest.approx(22, rel=1e-5)


def test_15_biases_of_experts_would_be_summed_over_different_experts() -> None:
    assert seen("bias_of_an_expert", 2) == (True, False)


def test_16_later_stages_keep_the_whole_padding_mask_under_sequence_parallelism() -> None:
    assert seen("mask_of_a_later_stage", 2, "qwen3-moe") == (8, 4)


def test_17_experts_under_tensor_parallelism_alone_are_refused() -> None:
    assert "ValueError" in seen("experts_without_sequence_parallelism", 2, "qwen3-moe")
