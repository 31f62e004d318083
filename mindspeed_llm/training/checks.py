"""`--debug-checks`: what must hold after every step, whatever the layout, looked at bit for bit.

Replicas of a parameter are equal; the frozen base is what it was; ranks of a model replica read the same rows. Bits are
compared by checksums: the sum of a tensor's bits taken as integers, which any one changed element changes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from mindspeed_llm.errors import InputError
from mindspeed_llm.training.engine import Batch, Engine, finish_parameter_sync

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NAMED = 4  # parameters that a message lists
Named = list[tuple[str, nn.Parameter]]


def checksum(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, added up in 64 bits (with overflow); stays on its device."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


def checksums(parameters: Named) -> Tensor:
    """[n] checksums."""
    return torch.stack([checksum(p) for _, p in parameters])


def unequal(sums: Tensor, group: Any) -> list[int]:
    """Numbers of the checksums that differ within the group; the same on all its ranks. Collective."""
    if group.size() == 1:
        return []
    low, high = sums.clone(), sums.clone()
    torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN, group=group)
    torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX, group=group)
    return (low != high).nonzero().flatten().tolist()


class DebugChecks:
    """Holds the frozen base's checksums from the start on; `after` raises where something does not hold."""

    def __init__(self, engine: Engine) -> None:
        """Args: engine: loaded, before its first step."""
        self.engine = engine
        chunks = enumerate(engine.chunks)
        named = [
            (f"{name} (chunk {n})" if n else name, p) for n, chunk in chunks for name, p in chunk.named_parameters()
        ]
        experts = [(name, p) for name, p in named if not getattr(p, "allreduce", True)]
        dense = [(name, p) for name, p in named if getattr(p, "allreduce", True)]
        whole = [(name, p) for name, p in dense if not getattr(p, "tensor_model_parallel", False)]
        self.groups = (
            (dense, parallel_state.get_data_parallel_group(with_context_parallel=True), "data-parallel replicas"),
            (experts, parallel_state.get_expert_data_parallel_group(), "replicas of experts"),
            (whole, parallel_state.get_tensor_model_parallel_group(), "tensor-parallel ranks"),
        )
        self.frozen = [(name, p) for name, p in named if not p.requires_grad]
        self.base = checksums(self.frozen) if self.frozen else None

    def after(self, step: int, batches: Sequence[Batch]) -> None:
        """Check a finished step. Collective.

        Raises:
            InputError: on every rank, naming what differs and where.
        """
        finish_parameter_sync(self.engine)
        found = [*self._replicas(), *self._base(), *self._rows(batches)]
        told: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(told, found)
        lines = [f"rank {rank}: {line}" for rank, lines in enumerate(told) for line in lines]
        if lines:
            more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
            raise InputError(
                f"--debug-checks after step {step}: {'; '.join(lines[:3])}{more}; the last checkpoint is the last that "
                "can be trusted: please report it with this command, and try --device cpu to tell a device's fault"
            )

    def _replicas(self) -> list[str]:
        found = []
        for parameters, group, who in self.groups:
            wrong = unequal(checksums(parameters), group) if parameters else []
            if wrong:
                found.append(f"{who} differ in {_listed([parameters[n][0] for n in wrong])}")
        return found

    def _base(self) -> list[str]:
        if self.base is None:
            return []
        wrong = (checksums(self.frozen) != self.base).nonzero().flatten().tolist()
        return [f"the frozen base has changed in {_listed([self.frozen[n][0] for n in wrong])}"] if wrong else []

    def _rows(self, batches: Sequence[Batch]) -> list[str]:
        sums = torch.stack([checksum(batch[name]) for batch in batches for name in ("tokens", "labels")])
        wrong = unequal(sums, parallel_state.get_model_parallel_group())
        return ["ranks of one model replica read different rows"] if wrong else []


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more parameters" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
