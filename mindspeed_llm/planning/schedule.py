"""Which micro-batches a pipeline stage holds at once, by megatron-core's schedules.

One stage: forward and backward of one micro-batch after the other. Several: first as many forward passes as there are
stages behind (1F1B, Narayanan et al., arXiv 2104.04473); interleaved, (p - 1 - rank) x 2 + (v - 1) p chunk passes.
"""

from collections import Counter

from mindspeed_llm.planning.job import Job


def chunk_passes(job: Job, pp_rank: int) -> list[int]:
    """The chunks (virtual ranks) whose activations a stage holds when it holds most, one entry for each micro-batch."""
    layout, number = job.layout, job.micro_batches
    if layout.pp == 1:
        return [0]
    if layout.vp == 1:
        return [0] * min(layout.pp - pp_rank, number)
    warm_up = (layout.pp - 1 - pp_rank) * 2 + (layout.vp - 1) * layout.pp
    passes = min(warm_up + 1, number * layout.vp)
    return [step // layout.pp % layout.vp for step in range(passes)]


def received(job: Job, pp_rank: int) -> int:
    """Tensors of a micro-batch's hidden states that a stage holds received from its neighbours at most.

    Inputs stay until their backward pass. Interleaved, the next inputs and gradients arrive while passes run; else the
    next one while the last is still held.
    """
    layout = job.layout
    if layout.pp == 1:
        return 0
    inputs = Counter(chunk_passes(job, pp_rank))
    held = sum(count for chunk, count in inputs.items() if not layout.is_first(pp_rank, chunk))
    if layout.vp == 1:
        only_gradients = 2 if pp_rank == 0 else 0
        both = 1 if 0 < pp_rank < layout.pp - 1 else 0
        return held + (1 if pp_rank else 0) + only_gradients + both
    receiving = sum(not layout.is_first(pp_rank, chunk) for chunk in range(layout.vp))
    return min(held + (1 if pp_rank == 0 else 3), job.micro_batches * receiving) + 1


def bubble(job: Job) -> float:
    """Idle share of a stage relative to its work: (p - 1) / (v m)."""
    layout = job.layout
    return (layout.pp - 1) / (layout.vp * job.micro_batches)
