"""Planted faults of experts and context parallelism; those that megatron-core 0.16.1 has itself bear a number.

Imports megatron-core.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.models import context, moe, rope
from mindspeed_llm.models.causal_lm import CausalLM
from mindspeed_llm.training import engine


def expert_parameters(chunk: CausalLM) -> list[torch.nn.Parameter]:
    """Trainable parameters of experts."""
    return [p for name, p in chunk.named_parameters() if p.requires_grad and "local_experts" in name]


def in_dense_group(chunk: CausalLM) -> None:
    """Defect 3: without expert parallelism experts are completed over the processes of the dense parameters."""
    for parameter in expert_parameters(chunk):
        parameter.allreduce = True


def left_partial(chunk: CausalLM) -> None:
    """A factor that the parts of an expert hold alike keeps one part's gradient."""
    for parameter in expert_parameters(chunk):
        parameter.expert_partial = False


def routers_of_own_tokens(chunk: CausalLM) -> None:
    """Trained routers keep the gradient of their process's part of the sequence."""
    for name, parameter in chunk.named_parameters():
        if name.endswith("router.weight"):
            parameter.sequence_parallel = False


def counted_by_dense_rank(chunk: CausalLM) -> None:
    """Experts that are whole on every process count in the gradient norm where the dense tensor rank is 0."""
    for parameter in expert_parameters(chunk):
        parameter.tensor_model_parallel = False


def default_messages(chunk: CausalLM) -> None:
    """Defect 2: interleaved stages with megatron-core's default messages between them."""
    chunk.config.overlap_p2p_comm, chunk.config.batch_p2p_comm = False, True


def pair_loss(losses: Tensor, trained: Tensor, parts: int, per_token: bool) -> tuple[Tensor, Tensor]:
    """Defect 5: a loss given as (mean, report) is multiplied by the number of context-parallel processes."""
    total, count, report = engine_sum_loss(losses, trained, parts, per_token)
    return total / count.clamp(min=1), report


engine_sum_loss = engine.sum_loss


def own_part_only(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """Gradients of keys and values are not summed over context parallelism."""
    return ctx.cut.own(grad, 0, ctx.group.rank()), None, None


def first_angles(whole: Tensor, dim: int, group: Any, cut: Any = None) -> Tensor:
    """Every process turns its heads as if it had the first positions."""
    return whole[: whole.size(0) // group.size()]


def one_after_another(rank: int, size: int) -> tuple[int, int]:
    """Processes take their pieces in order."""
    return 2 * rank, 2 * rank + 1


CHUNK: dict[str, Callable[[CausalLM], None]] = {
    "experts-in-dense-group": in_dense_group,
    "partial-factors-kept": left_partial,
    "routers-of-own-tokens": routers_of_own_tokens,
    "experts-counted-by-dense-rank": counted_by_dense_rank,
    "default-messages": default_messages,
}
"""What is done to a model chunk before it is wrapped for training."""
PATCHES: dict[str, tuple[Any, str, Any]] = {
    "pair-loss": (engine, "sum_loss", pair_loss),
    "context-gradients-not-summed": (context._Whole, "backward", staticmethod(own_part_only)),
    "angles-of-other-positions": (rope, "own_positions", first_angles),
    "balance-of-own-tokens": (moe, "summed", lambda value, group: value.detach().clone()),
    "pieces-in-another-order": (context, "pieces", one_after_another),
}  # fmt: skip
"""(where, attribute, what stands there instead)."""
