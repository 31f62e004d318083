"""Marks by which gradients of expert parameters are completed over the right processes, and counted once.

megatron-core 0.16.1 tells experts from the rest only where expert parallelism is above 1 (defect 3: experts that are
replicated over tensor parallelism get the gradient of one process's tokens). Here every expert parameter says so
itself:

    allreduce = False            its gradient is summed over the processes that hold the same expert
    tensor_model_parallel        counts in this process's gradient norm
    expert_partial               every process that holds a part of the expert sees a part of the gradient of this
                                 parameter, which they hold alike: it is summed over them after the backward pass
"""

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed import ProcessGroup


def mark_expert_parameter(parameter: nn.Parameter, group: ProcessGroup, split: int | None) -> None:
    """Mark a parameter of an expert.

    Args:
        group: the processes the expert is cut over (ETP).
        split: the dimension they share; None where each of them holds the whole parameter.
    """
    parameter.allreduce = False
    parameter.sequence_parallel = False  # set on biases: it would sum different experts' gradients (defect 15)
    parameter.expert_partial = split is None and group.size() > 1
    if hasattr(parameter, "tensor_model_parallel"):
        return
    if split is not None or group.rank() == 0:
        # ranks of one expert are counted apart; without the mark only dense tensor-parallel rank 0 would count
        set_tensor_model_parallel_attributes(parameter, True, split or 0, 1)


@torch.no_grad()
def sum_partial_gradients(chunks: list[nn.Module], group: ProcessGroup) -> None:
    """Complete the gradients of parameters marked `expert_partial`; one collective over `group` (ETP)."""
    if group.size() == 1:
        return
    parameters = (parameter for chunk in chunks for parameter in chunk.parameters())
    grads = [p.main_grad for p in parameters if p.requires_grad and getattr(p, "expert_partial", False)]
    if not grads:
        return
    joined = _flatten_dense_tensors(grads)
    torch.distributed.all_reduce(joined, group=group)
    for grad, whole in zip(grads, _unflatten_dense_tensors(joined, grads), strict=True):
        grad.copy_(whole)
