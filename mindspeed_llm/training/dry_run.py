"""`--dry-run`: one step of a run that is built as always, its live tensors counted, beside the prediction."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state

from mindspeed_llm.models.causal_lm import IGNORE
from mindspeed_llm.planning.job import Job
from mindspeed_llm.planning.memory import Memory, memory
from mindspeed_llm.planning.show import peaks
from mindspeed_llm.planning.tracker import LiveMemory
from mindspeed_llm.planning.weights import ModelWeights
from mindspeed_llm.training.engine import Batch, StepResult, train_step
from mindspeed_llm.training.live_tensors import tensors_by_class
from mindspeed_llm.training.planned import job_of
from mindspeed_llm.training.report import say
from mindspeed_llm.training.setup import Run


def job_of_batches(run: Run, batches: list[Batch]) -> Job:
    """The job of these very micro-batches: their largest shape, and their largest share of labels."""
    rows, length = max((batch["tokens"].shape for batch in batches), key=lambda shape: shape[0] * shape[1])
    labelled = max(int((batch["labels"] != IGNORE).sum()) for batch in batches)
    processes = torch.distributed.get_world_size()
    inner = max((batch["packed"].segments.longest for batch in batches if "packed" in batch), default=None)
    of_run = job_of(
        run.options, run.metadata.model, run.start.settings, run.metadata.layout, processes, length,
        run.device.name != "cpu", inner,
    )  # fmt: skip
    return replace(
        of_run, micro_batch=rows, micro_batches=len(batches), length=length, trained=labelled / (rows * length)
    )


def measured_step(run: Run, batches: list[Batch]) -> tuple[StepResult, dict[str, int]]:
    """One training step; -> (result, peak bytes of live tensors by class and in all)."""
    with LiveMemory(tensors_by_class(run.engine)) as seen:
        result = train_step(run.engine, batches)
    return result, {**seen.peak, "total": seen.total}


def dry_run(run: Run) -> None:
    """Train one step and print every rank's peaks, on rank 0; collective. Nothing is saved."""
    batches = run.feed.batches(run.progress.consumed_samples)
    job = job_of_batches(run, batches)
    run.schedule.set(run.progress.iteration + 1)
    result, seen = measured_step(run, batches)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    predicted = memory(job, ModelWeights(job.model, job.lora), stage)
    mine: tuple[int, Memory, dict[str, int]] = stage, predicted, seen
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    for feed in (run.feed, run.validation, run.test):
        if feed is not None:
            feed.close()
    if not run.first_rank:
        return
    places = [f"rank {rank} (stage {stage})" for rank, (stage, _, _) in enumerate(everyone)]
    say(peaks(places, [one for _, one, _ in everyone], [one for _, _, one in everyone]))
    now, peak = (value / 2**20 for value in run.device.memory())
    say(f"the device says, rank 0: {now:.0f} MiB now, {peak:.0f} at most (on a CPU: the whole process)")
    say(f"dry run: one step, loss {result.loss:.6g}, gradient norm {result.grad_norm:.4g}; nothing was saved")
