"""What a run wastes before it has begun: stages that wait for each other, padding; and what to set instead."""

import math

import numpy

WORK = 4  # times as long as it waits a pipeline stage should work; below that a better batch size is told
PADDING = 0.5  # share of padding above which another way of laying rows out is told


def bubble(stages: int, virtual: int, micro_batches: int) -> float:
    """Share of a step in which a pipeline stage waits: (p - 1) / (v m + p - 1), after Narayanan et al., 2021."""
    return (stages - 1) / (virtual * micro_batches + stages - 1)


def pipeline_advice(stages: int, virtual: int, micro_batches: int, micro: int, replicas: int) -> list[str]:
    """A warning where a pipeline mostly waits, with batch sizes that let it work.

    Args:
        stages: pipeline-parallel size. virtual: chunks of a stage.
        micro_batches: of one replica in a step. micro: rows of each. replicas: data-parallel size.
    """
    share = bubble(stages, virtual, micro_batches)
    if virtual * micro_batches >= WORK * (stages - 1):
        return []
    wanted = math.ceil(WORK * (stages - 1) / virtual)
    if virtual > 1:  # interleaved stages need a multiple of their number
        wanted = math.ceil(wanted / stages) * stages
    rows = micro * micro_batches
    smaller = [
        one
        for one in range(micro - 1, 0, -1)
        if rows % one == 0 and rows // one > micro_batches and (virtual == 1 or rows // one % stages == 0)
    ]
    fit = next((one for one in smaller if rows // one >= wanted), None)
    ways = [f"--global-batch-size {wanted * micro * replicas} keeps it at {bubble(stages, virtual, wanted):.0%}"]
    best = fit or (smaller[-1] if smaller else None)
    if best is not None:
        ways.insert(0, f"--micro-batch-size {best} makes it {bubble(stages, virtual, rows // best):.0%}")
    what = "micro-batch" if micro_batches == 1 else "micro-batches"
    return [
        f"warning: {stages} pipeline stages share {micro_batches} {what} per step and wait {share:.0%} of the time; "
        + ", or ".join(ways)
    ]


def padding_advice(lengths: numpy.ndarray, seq_length: int) -> list[str]:
    """A warning where rows padded to --seq-length are mostly padding.

    Args:
        lengths: [rows] tokens.
    """
    kept = float(numpy.minimum(lengths, seq_length).mean())
    if 1 - kept / seq_length <= PADDING:
        return []
    return [
        f"warning: rows have {kept:.0f} tokens on average and are padded to --seq-length {seq_length}: "
        f"{1 - kept / seq_length:.0%} of the work is padding; --no-pad-to-seq-lengths pads to the longest row of a "
        "micro-batch, --padding-free not at all"
    ]
