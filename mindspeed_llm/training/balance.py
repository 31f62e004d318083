"""The load-balancing loss of models with experts: its weight in a step's gradient, and its value for the log."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from mindspeed_llm.models.causal_lm import IGNORE
from mindspeed_llm.models.moe import Router, routers


def routers_of(engine: Any) -> list[Router]:
    """Routers of this rank's chunks."""
    return [router for chunk in engine.chunks for router in routers(chunk)]


def balances(engine: Any) -> bool:
    """Whether losses on the routers are asked for; the same on every rank."""
    return bool(engine.config.num_moe_experts and (engine.config.moe_aux_loss_coeff or engine.config.moe_z_loss_coeff))


def scale_balance(engine: Any, batches: Sequence[dict[str, Tensor]]) -> None:
    """Let every micro-batch's losses on the routers count 1 / (D M) of the step's gradient.

    megatron-core divides gradients by D c afterwards (D DP ranks, c CP ranks, whose shares add up), or under per-token
    loss by the trained tokens N of the global batch:

        per micro-batch:  scale = c / M             per token:  scale = N / (D M)

    Args:
        batches: this rank's M micro-batches, alike on all ranks of a replica.
    """
    if not balances(engine):
        return
    scale = parallel_state.get_context_parallel_world_size() / len(batches)
    if engine.config.calculate_per_token_loss:
        trained = sum((batch["labels"] != IGNORE).sum() for batch in batches)
        torch.distributed.all_reduce(trained, group=parallel_state.get_data_parallel_group())
        scale = float(trained) / (parallel_state.get_data_parallel_world_size() * len(batches))
    for router in routers_of(engine):
        router.balance_scale, router.balance_seen = scale, 0.0


def seen_balance(engine: Any, micro_batches: int) -> float | None:
    """The last step's load-balancing loss, see `training.engine.StepResult`; collective."""
    if not balances(engine) or not engine.config.moe_aux_loss_coeff:
        return None
    own = routers_of(engine)
    place = next(engine.chunks[0].parameters()).device
    total = torch.tensor([float(sum(router.balance_seen for router in own)), len(own)], device=place)
    # Shares add up over TP x CP, so every process counts; layers are counted by each process of their stage.
    torch.distributed.all_reduce(total)
    stage = torch.distributed.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size()
    layers = float(total[1]) / stage
    return float(total[0]) / (parallel_state.get_data_parallel_world_size() * micro_batches * max(layers, 1))
