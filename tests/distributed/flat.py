"""The reference's padded micro-batches as packed ones: the same rows without their padding, one behind the other."""

import math
from collections.abc import Sequence

import numpy

from tests.distributed.cases import Case
from tests.distributed.reference import IGNORE, MicroBatch

Steps = Sequence[Sequence[MicroBatch]]


def flat_batch(batch: MicroBatch, multiple: int) -> MicroBatch:
    """tokens, labels and real [1, s], s filled up to a multiple; position_ids [1, s]; cu_seqlens [segments + 1]."""
    real = batch["real"]
    sizes = real.sum(1).tolist()
    filling = -sum(sizes) % multiple
    sizes += [filling] if filling else []

    def join(field: str, fill: int) -> numpy.ndarray:
        return numpy.pad(batch[field][real], (0, filling), constant_values=fill)[None]

    return {
        "tokens": join("tokens", 0),
        "labels": join("labels", IGNORE),
        "real": join("real", 0),
        "position_ids": numpy.concatenate([numpy.arange(size) for size in sizes])[None],
        "cu_seqlens": numpy.cumsum([0, *sizes]),
    }


def steps_for(case: Case, steps: Steps) -> Steps:
    """The case's global batches: the reference's, or those packed."""
    if not case.packed:
        return steps
    tensor = case.tensor if case.sequence_parallel else 1
    multiple = tensor if case.context == 1 else case.context * math.lcm(2, tensor)
    return [[flat_batch(batch, multiple) for batch in step] for step in steps]


def row_by_row(values: numpy.ndarray, real: numpy.ndarray) -> numpy.ndarray:
    """Values [m, ...] of the real positions, ordered by position and then row -> ordered by row and then position."""
    order = numpy.zeros(real.T.shape, dtype=int)
    order[real.T] = numpy.arange(real.sum())
    return values[order.T[real]]
