"""The output layer and its cross entropy in one function, for a frozen output layer (LoRA).

Shapes: m labelled positions, h hidden, v vocabulary; `/t` = divided by TP.

The usual path keeps the logits three times (model type, float32, exponentials) and reads them again in the backward
pass. A frozen layer needs one gradient only, that of its input, and the loss's own gradient is known up to one factor
per position as soon as the loss is:

    d loss_i / d hidden_i = sum_j (softmax(logits_i)_j - [j = target_i]) W_j

so the forward pass computes it in place of the logits, and the backward pass scales it. Logits exist for ROWS positions
at a time and are never kept.

Where the model caps its logits at c, z' = c tanh(z / c), each term gets the factor dz'/dz = 1 - (z' / c)^2.
"""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from mindspeed_llm.device.rowwise import exponentials_, row_peaks

ROWS = 512  # positions whose logits exist at a time


class _HeadLoss(torch.autograd.Function):
    """Cross entropy of `hidden @ weight.T` against targets; see the module's text."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        width: int,
        cap: float | None,
        reduce: bool,
        group: ProcessGroup,
    ) -> Tensor:
        ctx.reduce, ctx.group = reduce, group
        losses = torch.empty(hidden.size(0), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.size(0), ROWS):
            rows = slice(start, start + ROWS)
            found, errors = _losses(hidden[rows], weight, targets[rows], width, cap, group)
            losses[rows] = found
            if gradient is not None:
                gradient[rows] = _gradient(weight, *errors)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        gradient = gradient * grad.to(gradient.dtype).unsqueeze(1)
        if ctx.reduce:
            distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None, None, None, None, None, None


def _losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, width: int, cap: float | None, group: ProcessGroup
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Losses [m], and what `_gradient` takes: the terms of this rank's share of the vocabulary."""
    logits = torch.mm(hidden, weight[:width].t())
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    peak = row_peaks(logits)
    if group.size() > 1:
        distributed.all_reduce(peak, op=distributed.ReduceOp.MAX, group=group)
    first = group.rank() * weight.size(0)
    own = (targets >= first) & (targets < first + width)
    local = torch.where(own, targets - first, 0)
    chosen = logits.gather(1, local.unsqueeze(1)).squeeze(1).float()
    target = torch.where(own, chosen - peak, 0.0)
    total = exponentials_(logits, peak, cap)
    if group.size() > 1:
        distributed.all_reduce(target, group=group)
        distributed.all_reduce(total, group=group)
    error = target.exp() - total
    if cap is not None:
        error *= 1 - (chosen / cap).square()  # the derivative of a capped logit by the logit
    return total.log() - target, (logits, local, own, error, total)


def _gradient(weight: Tensor, exponentials: Tensor, local: Tensor, own: Tensor, error: Tensor, total: Tensor) -> Tensor:
    """(softmax - one-hot) W, this rank's share [m, h]; the division by `total` is left to the narrow side.

    The target's entry is set to `error` = exp - total before the product: subtracting W's row afterwards would leave
    the rounding of a whole row where the model is nearly certain and the true gradient is small.
    """
    mine = own.nonzero().squeeze(1)
    exponentials[mine, local[mine]] = error[mine].to(exponentials.dtype)
    share = torch.mm(exponentials, weight[: exponentials.size(1)])
    return share.float().div_(total.unsqueeze(1)).to(weight.dtype)


def frozen_head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocabulary: int,
    cap: float | None,
    reduce: bool,
    group: ProcessGroup,
) -> Tensor:
    """Losses [m], fp32.

    Args:
        hidden: [m, h], whole on every TP rank.
        weight: [v/t, h], frozen; rows from `vocabulary` on (over all ranks) are padding and take no probability.
        targets: [m] token ids.
        cap: of the logits, or None.
        reduce: sum the gradient of `hidden` over TP here; False when a gather before this point does so.
        group: the TP group.
    """
    width = max(0, min(weight.size(0), vocabulary - group.rank() * weight.size(0)))
    return _HeadLoss.apply(hidden, weight, targets, width, cap, reduce and group.size() > 1, group)
