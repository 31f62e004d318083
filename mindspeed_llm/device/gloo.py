"""What gloo lacks of the collectives megatron-core calls, and one network thread for all its groups."""

import functools
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Store


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


@functools.cache
def network() -> tuple[Any, ...]:
    """The network devices of this process: those of GLOO_SOCKET_IFNAME, or the one of the host's name."""
    named = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    devices = [ProcessGroupGloo.create_device(interface=name) for name in named]
    return tuple(devices or [ProcessGroupGloo.create_default_device()])


class SharedNetwork(ProcessGroupGloo):
    """A group of processes that talks through the devices of `network()`.

    By itself every group opens a device of its own, with a thread that wakes up every 10 ms: megatron-core makes some
    thirty groups per process, whose threads together take a hundredth of a core where nothing happens.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices = list(network())
        options._timeout = timeout
        super().__init__(store, rank, size, options)
