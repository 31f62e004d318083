"""What a rank says to others: every torch.distributed operation by kind, group and bytes.

Seen below Python, where the dispatcher hands `c10d` operations to the process group, so that a function bound at
import, as megatron-core binds some, cannot hide.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
}
# kind -> which argument holds the larger tensor: an all-gather's result, a reduce-scatter's input
LARGER = {"reduce_scatter": 1}

Seen = Counter[tuple[str, str, int]]
"""(kind, group, bytes of the undivided tensor) -> how often."""


class Collectives(TorchDispatchMode):
    """Counts while it is entered; operations within a group of one process move nothing and are left out.

    Attributes:
        seen: what was counted.
    """

    def __init__(self, groups: Iterable[tuple[str, torch.distributed.ProcessGroup]]) -> None:
        """Args: groups: (short name, process group); operations in others are filed under the group's own name."""
        super().__init__()
        self.names = {group.group_name: name for name, group in groups}
        self.seen: Seen = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, args: Any) -> None:
        group = next(torch.distributed.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        if group.size() == 1:
            return
        kind = KINDS.get(operation, operation)
        tensors = args[LARGER.get(kind, 0)]
        nbytes = sum(tensor.nbytes for tensor in flat(tensors))
        self.seen[kind, self.names.get(group.group_name, group.group_name), nbytes] += 1


def flat(tensors: Any) -> list[torch.Tensor]:
    """A tensor, or the tensors in lists of lists of them."""
    return [tensors] if isinstance(tensors, torch.Tensor) else [one for part in tensors for one in flat(part)]


def totals(seen: Seen) -> dict[tuple[str, str], tuple[int, int]]:
    """(kind, group) -> (how many, bytes in all)."""
    result: dict[tuple[str, str], tuple[int, int]] = {}
    for (kind, group, nbytes), number in seen.items():
        count, total = result.get((kind, group), (0, 0))
        result[kind, group] = count + number, total + nbytes * number
    return result
