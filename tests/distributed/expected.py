"""Closed forms of what a layout must cost: bytes of parameters on a rank, and every collective of a global batch.

Shapes: s sequence, b rows, h hidden, f ffn, n query heads, g key-value heads, d head, r LoRA rank, v vocabulary, m
labelled positions, t = TP. All values are fp32.
"""

import math
from collections import Counter
from collections.abc import Sequence

from tests.distributed.cases import SIZES, Case
from tests.distributed.collectives import Seen
from tests.distributed.reference import IGNORE, MicroBatch

FLOAT = 4
SHAPE_MESSAGE = 3 * 8  # an activation's three dimensions as int64, sent ahead when lengths vary
REPORT = 3 * 8  # sums of losses, tokens and means as float64


def layers_of(case: Case, stage: int) -> int:
    """Decoder layers on a pipeline stage (only equal stages are tested)."""
    return SIZES.layers // case.pipeline


def adapter_sizes(case: Case) -> list[int]:
    """Elements of one layer's factors on a rank, in the order of the layers' parameters."""
    z, t = SIZES, case.tensor
    qkv, proj = (z.rank * z.hidden, z.qkv * z.rank // t), (z.rank * z.query // t, z.hidden * z.rank)
    fc1, fc2 = (z.rank * z.hidden, 2 * z.ffn * z.rank // t), (z.rank * z.ffn // t, z.hidden * z.rank)
    return [*proj, *qkv, *fc1, *fc2]


def parameter_bytes(case: Case, stage: int) -> int:
    """Bytes of all parameters of a rank on pipeline stage `stage`."""
    z, t = SIZES, case.tensor
    norms = 2 * z.hidden + 2 * z.head
    matrices = z.hidden * (z.qkv + z.query + 2 * z.ffn + z.ffn) // t
    layer = norms + matrices + (sum(adapter_sizes(case)) if case.lora else 0)
    table = math.ceil(z.vocab / t) * z.hidden
    first, last = stage == 0, stage == case.pipeline - 1
    shared = case.tied and first and last
    ends = table * first + (z.hidden + (0 if shared else table)) * last
    return FLOAT * (layers_of(case, stage) * layer + ends)


def collectives(case: Case, stage: int, dp: int, step: Sequence[MicroBatch]) -> Seen:
    """Every collective a rank takes part in during forward and backward of one global batch, with an adapter."""
    seen: Seen = Counter()
    for batch in step[dp :: case.replicas]:
        rows, length = batch["tokens"].shape
        labelled = int((batch["labels"] != IGNORE).sum())
        if case.tensor > 1:
            seen += tensor_collectives(case, stage, rows * length, labelled)
        if case.pipeline > 1:
            seen += pipeline_messages(case, stage, rows * length)
    return seen + end_of_batch(case, stage)


def tensor_collectives(case: Case, stage: int, positions: int, labelled: int) -> Seen:
    """Within TP, for one micro-batch.

    Per layer and pass, wide is [s, b, h], narrow is [s, b, r]:

              column forward       column backward          row forward         row backward
    no SP     -                    all-reduce wide, narrow  all-reduce both     -
    SP        all-gather wide      reduce-scatter both      reduce-scatter both all-gather wide
    "Both" is one message in the fused forms and two in the modular one, which under SP also gathers narrow in both
    passes: + 1 all-gather in each of the two SP all-gather cells. A fused MLP has the messages of its layers.
    """
    z, first, last = SIZES, stage == 0, stage == case.pipeline - 1
    layers, wide, narrow = layers_of(case, stage), FLOAT * positions * z.hidden, FLOAT * positions * z.rank
    passes = 2 if case.recompute == "full" else 1  # forward passes of every layer
    columns = rows = 2 * layers
    # Nothing before the first adapter is trained, so the first layer sends no gradient further back; under full
    # recomputation the embedding's output asks for one.
    backward = columns - (1 if first and case.recompute != "full" else 0)
    seen: Seen = Counter()
    sums = "reduce_scatter" if case.sequence_parallel else "all_reduce"
    if case.fused:
        seen[sums, "tp", wide + narrow] += rows * passes + backward
        seen[sums, "tp", narrow] += columns - backward
    else:
        seen[sums, "tp", wide] += rows * passes + backward
        seen[sums, "tp", narrow] += rows * passes + columns
    seen[sums, "tp", wide] += first
    if not case.sequence_parallel:
        if last:
            seen["all_reduce", "tp", FLOAT * labelled * z.hidden] += 1  # the head's backward
    else:
        seen["all_gather", "tp", wide] += columns * passes + rows + last
        seen["reduce_scatter", "tp", wide] += last
        if not case.fused:
            seen["all_gather", "tp", narrow] += columns * passes + rows
    if last:
        seen["all_reduce", "tp", FLOAT * labelled] += 3  # largest logit, label's logit, sum of exponentials
    return +seen


def pipeline_messages(case: Case, stage: int, positions: int) -> Seen:
    """Between stages, for one micro-batch: activations forward and their gradients backward, each with its shape.

    Interleaved stages send both ways at a time, so between two stages megatron-core takes the group of all processes
    for what the odd one sends.
    """
    wide = FLOAT * positions * SIZES.hidden // (case.tensor if case.sequence_parallel else 1)
    chunks = case.pipeline * (2 if case.virtual_layers else 1)
    own = range(stage, chunks, case.pipeline)
    outgoing = sum(chunk < chunks - 1 for chunk in own) + sum(chunk > 0 for chunk in own)
    seen: Seen = Counter()
    for kind in ("send", "recv"):  # what goes forward comes back as a gradient
        from_even = (kind == "send") == (stage % 2 == 0)
        seen[kind, "pp" if from_even or not case.virtual_layers else "world", wide] += outgoing
        if case.ragged:
            seen[kind, "pp", SHAPE_MESSAGE] += outgoing
    return seen


def end_of_batch(case: Case, stage: int) -> Seen:
    """Gradients completed over TP and DP, and the loss reported."""
    layers = layers_of(case, stage)
    chunks = 2 if case.virtual_layers else 1
    sizes = adapter_sizes(case) * (layers // chunks)
    seen: Seen = Counter()
    if case.sequence_parallel:
        seen["all_reduce", "tp", FLOAT * layers * 4 * SIZES.rank * SIZES.hidden] += 1  # the replicated factors
    if case.replicas > 1:
        if case.distributed_optimizer:
            seen["reduce_scatter", "dp", FLOAT * padded_buffer(sizes, case.replicas)] += chunks
        else:
            seen["all_reduce", "dp", FLOAT * sum(sizes)] += chunks
        seen["all_reduce", "dp", REPORT] += 1
        if case.per_token:
            seen["all_reduce", "dp", FLOAT] += 1
    if case.pipeline > 1:
        seen["broadcast", "pp", REPORT] += 1
        if case.per_token:
            seen["broadcast", "pp", FLOAT] += 1
    return seen


def padded_buffer(sizes: Sequence[int], replicas: int) -> int:
    """Elements of the distributed optimizer's gradient buffer: each parameter starts at a multiple of 64 elements, the
    whole ends at one of lcm(DP, 128). megatron-core fills it from the last parameter to the first."""
    end = 0
    for size in reversed(sizes):
        end = -(-end // 64) * 64 + size
    multiple = math.lcm(replicas, 128)
    return -(-end // multiple) * multiple
