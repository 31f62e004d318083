"""What gloo lacks of the collectives megatron-core calls."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def all_gather(tensors: Sequence[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
    """`torch.distributed.all_gather` that takes tensors of different lengths too, as NCCL's does.

    Experts cut over tensor parallelism gather each rank's tokens, and ranks have different numbers of them. Shorter
    tensors are padded along their first dimension to the longest, which every rank knows from `tensors`.
    """
    longest = max(one.size(0) for one in tensors)
    if all(one.size(0) == longest for one in tensors):
        return torch.distributed.all_gather(list(tensors), tensor, group=group, async_op=async_op)
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: tensor.size(0)] = tensor
    found = [torch.empty_like(padded) for _ in tensors]
    torch.distributed.all_gather(found, padded, group=group)
    for out, one in zip(tensors, found, strict=True):
        out.copy_(one[: out.size(0)])
    return None
