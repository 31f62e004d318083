"""DoRA: the length of every output row of W + s B A is trained apart from its direction.

    Y = m / |W + s B A|  (X W^T + s X A^T B^T)        |.| per output row; a constant in the backward pass

(Liu et al., arXiv 2402.09353, sections 4.1 and 4.3; peft computes the same.) Shapes as in `layers`; m [o] or [o/t].
"""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class Magnitude(nn.Module):
    """The trained lengths of a layer's output rows."""

    def __init__(self, like: Tensor) -> None:
        """Uninitialised: [rows], of the type and on the device of `like`."""
        super().__init__()
        self.weight = nn.Parameter(like.new_empty(like.size(0)))


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float, group: ProcessGroup | None) -> Tensor:
    """|W + s B A| of every output row, float32 [rows].

    The square is a sum over inputs, so shares of the inputs add up. It is found without the sum W + s B A:

        |w + s b A|^2  =  |w|^2 + 2 s b . (A w) + s^2 b (A A^T) b^T

    Args:
        weight: [rows, i]. a: [r, i]. b: [rows, r].
        group: the ranks that share the inputs; None where every rank has them all.
    """
    a, b = a.float(), b.float()
    own = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    crossed = (b * (weight @ a.to(weight.dtype).t()).float()).sum(1)
    squares = own + 2 * scaling * crossed + scaling**2 * (b * (b @ (a @ a.t()))).sum(1)
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(squares, group=group)
    return squares.clamp_min(0).sqrt()


def with_lengths(out: Tensor, seen: Tensor, delta: Tensor, bias: Tensor | None, factor: Tensor) -> Tensor:
    """m / |W + s B A| (X W^T + s X A^T B^T) + bias, where dropout may have hidden a part of X.

    As in peft, only the change of X W^T sees the dropped input:  Y = X W^T + (f - 1) X' W^T + f s X' A^T B^T + bias.

    Args:
        out: X W^T + bias, in the base layer's layout. seen: the same of the dropped input X'.
        delta: s X' A^T B^T. bias: the one in `out` and `seen`, or None.
        factor: f = m / |W + s B A| [rows].
    """
    plain = seen if bias is None else seen - bias
    return out + (factor - 1).to(out.dtype) * plain + (factor.to(delta.dtype) * delta).to(out.dtype)
