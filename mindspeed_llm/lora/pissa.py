"""PiSSA's start (Meng et al., arXiv 2404.02948): A and B of the largest singular vectors of W.

    W = U S V^T      A = sqrt(S_r / s) V_r^T      B = U_r sqrt(S_r / s)      so that s B A is the best rank r part of W

A layer's weight is taken whole as megatron-core joins it (q, k and v together, gate and up together), where peft
takes its parts one by one. What A and B begin with is taken out of the base, see `checkpoint.adapters.stored`.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mindspeed_llm.checkpoint.formats.lazy import InMemory, assemble, part_of
from mindspeed_llm.checkpoint.kinds import AxisMap, adapter_map
from mindspeed_llm.errors import UsageError


def principal_factors(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A [r, i] and B [o, r] in float32 with s B A the best approximation of rank r of `weight` [o, i].

    The largest value of each row of A is positive, so that equal weights give equal factors. Rows of zeros (parts of a
    fused layer that are not adapted) take no part: theirs in B are zero.

    Raises:
        UsageError: the matrix has fewer singular vectors than r.
    """
    rows = weight.any(dim=1)
    check_rank(rows, weight, r)
    u, s, v = torch.linalg.svd(weight[rows].float(), full_matrices=False)
    roots = (s[:r] / scaling).sqrt()
    a = v[:r] * roots[:, None]
    signs = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
    b = a.new_zeros(weight.size(0), r)
    b[rows] = u[:, :r] * roots * signs.t()
    return a * signs, b


def check_rank(rows: Tensor, weight: Tensor, r: int) -> None:
    """`UsageError` where the adapted rows of a weight (True in `rows`) have fewer singular vectors than r."""
    most = min(int(rows.sum()), weight.size(1))
    if most < r:
        raise UsageError(
            f"--lora-init pissa: {int(rows.sum())} adapted rows of {weight.size(1)} columns have {most} singular"
            f" vectors, --lora-r asks for {r}; give a smaller rank"
        )


@torch.no_grad()
def shared_factors(weight: Tensor, r: int, scaling: float, axis: AxisMap, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """This rank's A and B for its share of a weight; collective over `group`, whose first rank decomposes the whole.

    The whole has its rows in their logical order, so that every layout starts from the same factors.

    Args:
        weight: this rank's share.
        axis: how the ranks of `group` share the weight.
    """
    if axis.dim is None or group.size() == 1:
        return principal_factors(weight, r, scaling)
    shares = [torch.empty_like(weight) for _ in range(group.size())]
    torch.distributed.all_gather(shares, weight.contiguous(), group=group)
    whole = assemble([InMemory(share) for share in shares], axis)
    check_rank(whole.any(dim=1), whole, r)  # on every rank, so that none waits for one that has refused
    a = torch.empty(r, whole.size(1), device=weight.device)
    b = torch.empty(whole.size(0), r, device=weight.device)
    if group.rank() == 0:
        found = principal_factors(whole, r, scaling)
        a.copy_(found[0])
        b.copy_(found[1])
    for factor in (a, b):
        torch.distributed.broadcast(factor, torch.distributed.get_global_rank(group, 0), group=group)
    own = (("lora_A", a), ("lora_B", b))
    a, b = (part_of(InMemory(one).read, adapter_map(axis, name), group.rank()) for name, one in own)
    return a, b
