"""What pool processes run for single steps that are out of the ordinary. Imports megatron-core."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from mindspeed_llm.training.engine import evaluate, run_microbatches, train_step
from mindspeed_llm.training.optimizer_state import export_gradients
from tests.distributed.cases import Arrays, Case
from tests.distributed.worker import arrays, live, logical, share


def gradients(
    rank: int, case: Case, folder: Path, adapter: Arrays, global_batches: Sequence[Any]
) -> list[tuple[float, int, Arrays]]:
    """(loss, tokens, gradients) of each global batch, on the same weights."""
    found = []
    with live(case, folder, adapter) as engine:
        for batches in global_batches:
            for chunk in engine.wrapped:
                chunk.zero_grad_buffer()
            loss, tokens, _ = run_microbatches(engine, share(batches), forward_only=False)
            finished = export_gradients(engine.optimizer, logical(engine, trainable=True))
            found.append((loss, tokens, arrays(finished)))
    return found


def validated(rank: int, case: Case, folder: Path, adapter: Arrays, steps: Sequence[Any]) -> tuple[float, float, bool]:
    """(validation loss over global batches, of none, whether the model trains on afterwards)."""
    with live(case, folder, adapter) as engine:
        loss = evaluate(engine, iter([share(step) for step in steps]))
        empty = evaluate(engine, iter([]))
        return loss, empty, all(module.training for chunk in engine.wrapped for module in chunk.modules())


def broken_step(
    rank: int, case: Case, folder: Path, adapter: Arrays, batches: Sequence[Any]
) -> tuple[bool, bool, bool]:
    """A step whose gradients are not finite: (applied, norm is finite, weights changed); collective."""
    with live(case, folder, adapter) as engine:
        for name, parameter in logical(engine).items():
            if name == "decoder.final_layernorm.weight":
                parameter.data[0] = float("inf")
        before = arrays(logical(engine, trainable=True))
        done = train_step(engine, share(batches))
        after = arrays(logical(engine, trainable=True))
        changed = any(not numpy.array_equal(after[name], value) for name, value in before.items())
        return done.updated, bool(numpy.isfinite(done.grad_norm)), changed
