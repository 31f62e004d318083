"""The output layer and its cross entropy in one function, for a frozen output layer (LoRA).

Shapes: m labelled positions, h hidden, v vocabulary; `/t` = divided by TP.

The usual path keeps the logits three times (model type, float32, exponentials) and reads them again in the backward
pass. A frozen layer needs one gradient only, that of its input, and the loss's own gradient is known up to one factor
per position as soon as the loss is:

    d loss_i / d hidden_i = sum_j (softmax(logits_i)_j - [j = target_i]) W_j

so the forward pass computes it in place of the logits, and the backward pass scales it. Products run in slices of the
vocabulary: a product 32,000 wide runs at half the rate of one 2,000 wide on the CPUs measured.
"""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

SLICE = 2048  # columns of one product and of one float32 temporary


class _HeadLoss(torch.autograd.Function):
    """Cross entropy of `hidden @ weight.T` against targets; see the module's text."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, width: int, reduce: bool, group: ProcessGroup
    ) -> Tensor:
        rank, rows = group.rank(), weight.size(0)
        logits = hidden.new_empty(hidden.size(0), width)
        slices = [slice(start, min(start + SLICE, width)) for start in range(0, width, SLICE)]
        peak = torch.full((hidden.size(0),), -torch.inf, dtype=torch.float32, device=hidden.device)
        for part in slices:
            torch.mm(hidden, weight[part].t(), out=logits[:, part])
            peak = torch.maximum(peak, logits[:, part].amax(-1).float())
        if group.size() > 1:
            distributed.all_reduce(peak, op=distributed.ReduceOp.MAX, group=group)
        own = (targets >= rank * rows) & (targets < rank * rows + width)
        local = torch.where(own, targets - rank * rows, 0)
        target = torch.where(own, logits.gather(1, local.unsqueeze(1)).squeeze(1).float() - peak, 0.0)
        total = torch.zeros_like(peak)
        for part in slices:
            exponentials = logits[:, part].float().sub_(peak.unsqueeze(1)).exp_()
            total += exponentials.sum(-1)
            logits[:, part] = exponentials
        if group.size() > 1:
            distributed.all_reduce(target, group=group)
            distributed.all_reduce(total, group=group)
        ctx.reduce, ctx.group = reduce, group
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_gradient(logits, weight, local, own, target.exp() - total, total))
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        gradient = gradient * grad.to(gradient.dtype).unsqueeze(1)
        if ctx.reduce:
            distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None, None, None, None, None


def _gradient(exponentials: Tensor, weight: Tensor, local: Tensor, own: Tensor, error: Tensor, total: Tensor) -> Tensor:
    """(softmax - one-hot) W, this rank's share [m, h]; the division by `total` is left to the narrow side.

    The target's entry is set to `error` = exp - total before the product: subtracting W's row afterwards would leave
    the rounding of a whole row where the model is nearly certain and the true gradient is small.
    """
    mine = own.nonzero().squeeze(1)
    exponentials[mine, local[mine]] = error[mine].to(exponentials.dtype)
    share = torch.mm(exponentials, weight[: exponentials.size(1)])
    return share.float().div_(total.unsqueeze(1)).to(weight.dtype)


def frozen_head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, reduce: bool, group: ProcessGroup
) -> Tensor:
    """Losses [m], fp32.

    Args:
        hidden: [m, h], whole on every TP rank.
        weight: [v/t, h], frozen; rows from `vocabulary` on (over all ranks) are padding and take no probability.
        targets: [m] token ids.
        reduce: sum the gradient of `hidden` over TP here; False when a gather before this point does so.
        group: the TP group.
    """
    width = max(0, min(weight.size(0), vocabulary - group.rank() * weight.size(0)))
    return _HeadLoss.apply(hidden, weight, targets, width, reduce and group.size() > 1, group)
