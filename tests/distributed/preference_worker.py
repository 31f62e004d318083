"""What pool processes run to learn from pairs: a layout built, gradients, every step. Imports megatron-core."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from megatron.core import parallel_state as groups

from mindspeed_llm.data.batch import collate, collate_flat
from mindspeed_llm.data.pairs import in_pairs
from mindspeed_llm.training import preference as module
from mindspeed_llm.training.engine import evaluate, finish_parameter_sync, run_microbatches, to_device, train_step
from mindspeed_llm.training.optimizer_state import export_gradients
from mindspeed_llm.training.preference import Preference
from mindspeed_llm.training.schedule import Schedule
from tests.distributed.cases import Arrays, Case
from tests.distributed.preference_reference import Loss, Pair
from tests.distributed.worker import OPTIONS, arrays, live, logical

LONGEST = 64


@dataclass
class Report:
    """One process's account; `gradients` as `worker.Result` has them."""

    tp: int
    etp: int
    gradients: Arrays
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)
    frozen_changed: list[str] = field(default_factory=list)
    validation: float = 0.0


def row(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    """A row as files hold it."""
    return {
        "input_ids": numpy.array(prompt + answer, numpy.int32),
        "labels": numpy.array([-100] * len(prompt) + answer, numpy.int32),
    }


def batch_of(pairs: Sequence[Pair], case: Case) -> Any:
    """The pairs as the package collates them for the case."""
    cut = max(case.tensor if case.sequence_parallel else 1, 1) * (2 * case.context if case.context > 1 else 1)
    common = {"pad_id": 0, "seq_length": LONGEST, "pad_to_multiple_of": cut}
    layout = partial(collate_flat, **common) if case.packed else partial(collate, pad_to_longest=True, **common)
    rows = [{side: row(pair["prompt_ids"], pair[f"{side}_ids"]) for side in ("chosen", "rejected")} for pair in pairs]
    return to_device(in_pairs(layout)(rows), torch.device("cpu"))


def share(step: Sequence[Sequence[Pair]], case: Case) -> list[Any]:
    """This DP rank's micro-batches: every D-th."""
    mine = step[groups.get_data_parallel_rank() :: groups.get_data_parallel_world_size()]
    return [batch_of(pairs, case) for pairs in mine]


def adapters_on(model: Any) -> Any:
    """Planted fault: the reference is the adapted model."""
    return nullcontext()


def summed_over_all(values: torch.Tensor, batch: Any) -> torch.Tensor:
    """Planted fault: the next sequence's labels are counted for each."""
    return sequence_sums(values, {**batch, "sequences": batch["sequences"].roll(1, 0)})


def own_part(values: torch.Tensor, batch: Any) -> torch.Tensor:
    """Planted fault: no sum over CP."""
    with mock.patch.object(module, "reduce_from_tensor_model_parallel_region", lambda sums, group: sums):
        return sequence_sums(values, batch)


def sides_swapped(self: Preference, policy: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """Planted fault: the rejected answer is preferred."""
    return pair_losses(self, *(torch.cat(one.chunk(2)[::-1]) for one in (policy, *rest)))


sequence_sums, pair_losses = module.sequence_sums, Preference.pair_losses
FAULTS: dict[str, Callable[[], Any]] = {
    "reference-with-adapter": partial(mock.patch.object, module, "adapters_off", adapters_on),
    "sequences-mixed": partial(mock.patch.object, module, "sequence_sums", summed_over_all),
    "positions-not-summed": partial(mock.patch.object, module, "sequence_sums", own_part),
    "sides-swapped": partial(mock.patch.object, Preference, "pair_losses", sides_swapped),
}


@contextmanager
def preferring(case: Case, folder: Path, adapter: Arrays, loss: Loss) -> Iterator[Any]:
    """The case's engine with the loss as its objective, and the case's fault in it."""
    fault = FAULTS.get(case.fault or "", nullcontext)
    with fault(), live(case, folder, adapter) as engine:
        engine.preference = Preference(loss.beta, loss.kind, loss.smoothing, loss.sft)
        yield engine


def learn(rank: int, case: Case, folder: Path, adapter: Arrays, steps: Sequence[Any], loss: Loss) -> Report:
    """Gradients of the first global batch, the validation loss of it, then every step."""
    with preferring(case, folder, adapter, loss) as engine:
        frozen = {name: p.detach().clone() for name, p in logical(engine, trainable=False).items()}
        validation = evaluate(engine, iter([share(steps[0], case)]))
        for chunk in engine.wrapped:
            chunk.zero_grad_buffer()
        run_microbatches(engine, share(steps[0], case), forward_only=False)
        found = arrays(export_gradients(engine.optimizer, logical(engine, trainable=True)))
        place = groups.get_tensor_model_parallel_rank(), groups.get_expert_tensor_parallel_rank()
        report = Report(*place, found, validation=validation)
        schedule = Schedule(engine.optimizer, OPTIONS, len(steps))
        for number, step in enumerate(steps, 1):
            schedule.set(number)
            done = train_step(engine, share(step, case))
            report.losses.append(done.loss)
            report.norms.append(done.grad_norm)
            report.tokens.append(done.tokens)
            report.figures.append(done.figures)
        finish_parameter_sync(engine)
        now = logical(engine, trainable=False)
        report.frozen_changed = [name for name, before in frozen.items() if not torch.equal(before, now[name])]
        return report
