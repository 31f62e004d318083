"""Micro-batches through the pipeline, by megatron-core's schedule."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mindspeed_llm.models.context import own_positions

Batch = dict[str, Any]
"""A micro-batch on the device: tokens and labels [b, s]; of packed rows [1, s], and `packed`, their `PackedRows`."""


def forward(batch: Batch, model: Any) -> Tensor:
    """One micro-batch through one model chunk: hidden states, or the last chunk's losses [m] of labelled positions."""
    tokens, labels, padding = own(batch, "tokens", "labels", "padding")
    return model(tokens, None, None, labels=labels, packed_seq_params=batch.get("packed"), padding_mask=padding)


def own(batch: Batch, *names: str) -> list[Tensor | None]:
    """This process's positions, under context parallelism, of entries [b, s] of a micro-batch; None if absent."""
    cut = batch["packed"].cut if "packed" in batch else None
    group = parallel_state.get_context_parallel_group()
    return [own_positions(batch.get(name), 1, group, cut) for name in names]


def run(
    models: Sequence[Any],
    step: Callable[[Iterator[Batch], Any], tuple[Tensor, Any]],
    batches: Sequence[Batch],
    forward_only: bool,
    **more: Any,
) -> list[Any]:
    """Run micro-batches through all chunks; -> what the last stage reports of each, nothing on other stages.

    Args:
        models: this rank's chunks.
        step: takes the next micro-batch through one chunk; -> (output, function of the last chunk's output).
        more: of megatron-core's schedules.
    """
    micro_batch_size, length = batches[0]["tokens"].shape
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in models] if len(models) > 1 else iter(batches),
        model=list(models) if len(models) > 1 else models[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        **more,
    )
