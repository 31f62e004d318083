"""The run itself: step, report, validate, save, stop when asked."""

import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from megatron.core import parallel_state

from mindspeed_llm.arguments.parser import to_dict
from mindspeed_llm.training import advice, checkpointing
from mindspeed_llm.training.checkpointing import barrier
from mindspeed_llm.training.engine import StepResult, evaluate, train_step
from mindspeed_llm.training.report import Report, say
from mindspeed_llm.training.setup import Run, count_cut_rows
from mindspeed_llm.training.watch import Watch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a SIGTERM or SIGUSR1 until the end of the step; the signals' former handlers come back afterwards."""

    def __init__(self) -> None:
        self.asked = False
        self.former: dict[int, object] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __enter__(self) -> "StopRequest":
        self.former = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.former.items():
            # None: installed by foreign code outside Python, which the default stands in for
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def agreed(self, device: torch.device, odd: bool) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether any saw something `odd`; the same answer on every rank."""
        flags = torch.tensor((float(self.asked), float(odd)), device=device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        stop, seen = flags.tolist()
        return bool(stop), bool(seen)


def train(run: Run, report: Report | None) -> bool:
    """Train to the end, or to a stop request; -> whether the run is complete.

    Args:
        report: on the rank that prints, else None.
    """
    place, every = run.feed.device, run.options.checkpoint.save_interval
    saved = applied = run.progress.iteration
    with Watch(run, report) as watch, StopRequest() as stop:
        while run.progress.iteration < run.train_iters:
            watch.begins()
            batches = run.feed.batches(run.progress.consumed_samples)
            watch.has_rows(batches)
            rate = run.schedule.set(run.progress.iteration + 1)
            result = train_step(run.engine, batches)
            advance(run, result)
            odd = watch.ends(result, rate)
            iteration = run.progress.iteration
            applied = iteration if result.updated else applied
            watch.check()
            validate(run, report)
            stopping, odd = stop.agreed(place, odd)
            told = watch.explain() if odd else ""
            ends = watch.too_many()
            due = stopping or iteration == run.train_iters or (every and iteration % every == 0)
            if due or (ends and applied > saved):
                save(run)
                saved = iteration
            if ends:
                raise watch.end_of_run(told)
            if stopping:
                break
    for feed in (run.feed, run.validation, run.test):
        if feed is not None:
            feed.close()
    return saved == run.train_iters


def advance(run: Run, result: StepResult) -> None:
    """Count a finished step."""
    done = run.progress
    run.progress = replace(
        done,
        iteration=done.iteration + 1,
        consumed_samples=done.consumed_samples + run.global_batch_size,
        skipped=done.skipped + (not result.updated),
        nan=done.nan + (not math.isfinite(result.loss)),
    )


def validate(run: Run, report: Report | None) -> None:
    """Losses of the rows held out: for validation every --eval-interval steps and at the end, for the test at the end.

    Over all of these rows, or the first --eval-iters global batches.
    """
    training, iteration = run.options.training, run.progress.iteration
    ends = iteration == run.train_iters
    due = ((run.validation, "validation", iteration % training.eval_interval == 0 or ends), (run.test, "test", ends))
    for feed, name, now in due:
        if feed is None or training.eval_iters == 0 or not now:
            continue
        whole = math.ceil(len(feed.source) / run.global_batch_size)
        loss = evaluate(run.engine, feed.walk(min(training.eval_iters or whole, whole)))
        if report is not None:
            report.validation(iteration, loss, name)


def save(run: Run) -> Path:
    """Save a checkpoint; the first one of a run with --overwrite also removes what it replaces."""
    options, lora = run.options.checkpoint, run.start.settings is not None
    folder, iteration = Path(options.save or ""), run.progress.iteration
    if run.first_rank:
        say(f"saving checkpoint at iteration {iteration:7d} to {folder} in torch format")
    final = checkpointing.save(
        run.engine,
        folder,
        replace(run.metadata, iteration=iteration),
        run.progress,
        run.device,
        adapter_only=lora and run.options.lora.lora_ckpt_filter,
        with_optimizer=not options.no_save_optim,
        with_rng=not options.no_save_rng,
        export=run.export,
    )
    if run.first_rank:
        say(f"  successfully saved checkpoint from iteration {iteration:7d} to {folder}")
        for old in run.start.stale:
            if old.resolve() != final.resolve():
                shutil.rmtree(old)
    run.start = replace(run.start, stale=())
    barrier(run.device)
    return final


def shares_of_pass(run: Run) -> list[str]:
    """How many rows of each data set make a pass, where they have shares; what is held out."""
    part, blend = run.rows.parts.train, run.feed.sampler.blend
    lines = []
    if blend is not None:
        shown = zip(part.weights, blend.counts.tolist(), part.sizes, part.prefixes, strict=True)
        lines.append(
            "a pass has " + ", ".join(f"{count:,} of {size:,} rows ({w:.1%}) of {p}" for w, count, size, p in shown)
        )
    held = [(feed, name) for feed, name in ((run.validation, "validation"), (run.test, "test")) if feed is not None]
    return [*lines, *(f"{len(feed.source):,} {name} rows" for feed, name in held)]


# what the order of rows follows from, by the group of options that holds it
ORDER = {
    "data": ("data_path", "train_data_path", "split", "no_shuffle", "length_grouping"),
    "training": ("seed",),
    "sources": ("dataset",),
    "rows": ("input",),
}


def changed_order(run: Run) -> list[str]:
    """A warning where a resumed run reads its rows in another order than the one it continues."""
    start = run.start.resume
    if start is None or start.metadata is None:
        return []
    now, before = to_dict(run.options), start.metadata.options
    names = [(group, name) for group, listed in ORDER.items() for name in listed]
    if run.options.data.length_grouping:
        names.append(("training", "global_batch_size"))
    changed = [
        f"--{name.replace('_', '-')}"
        for group, name in names
        if name in before.get(group, {}) and before[group][name] != now[group][name]
    ]
    if not changed:
        return []
    return [
        f"warning: {', '.join(changed)} changed since {start.folder}: rows come in another order, so that some of this "
        "epoch's may be read twice or not at all"
    ]


def wasted(run: Run) -> list[str]:
    """Warnings about hardware that will mostly wait or compute padding."""
    layout, sampler, data = run.metadata.layout, run.feed.sampler, run.options.data
    replicas = parallel_state.get_data_parallel_world_size()
    lines = advice.pipeline_advice(layout.pp, layout.vp, sampler.num_microbatches, sampler.micro_batch_size, replicas)
    if data.no_pad_to_seq_lengths or data.lays_out_flat:
        return lines
    return lines + advice.padding_advice(run.feed.source.lengths, data.seq_length)


def announcement(run: Run) -> list[str]:
    """What is about to happen, in a few lines."""
    world = torch.distributed.get_world_size()
    layout, settings = run.metadata.layout, run.start.settings
    parameters = sum(p.numel() for chunk in run.engine.chunks for p in chunk.parameters() if p.requires_grad)
    what = (
        "full tuning"
        if settings is None
        else (
            f"LoRA r {settings.r} alpha {settings.alpha} on {' '.join(settings.target_modules)}"
            f"{' (fused)' if run.options.lora.lora_fusion else ''}"
        )
    )
    source = run.feed.source
    pieces = parallel_state.get_context_parallel_world_size()
    context = f" CP{pieces}" if pieces > 1 else ""
    lines = [
        f"{what}: {parameters:,} trainable parameters on this rank, {run.metadata.model.dtype}, {run.device.name}",
        f"{layout}{context} DP{parallel_state.get_data_parallel_world_size()} on {world} processes; "
        f"base {run.start.base_path}",
        f"{len(source):,} training rows, {int(source.lengths.sum()):,} tokens; {run.train_iters} steps of "
        f"{run.global_batch_size} rows = {run.train_iters * run.global_batch_size / len(source):.2f} epochs",
        *shares_of_pass(run),
        *run.rows.notes,
        *changed_order(run),
    ]
    if run.progress.iteration:
        lines.append(f"resumed at step {run.progress.iteration} from {run.start.resume.folder}")
    if cut := count_cut_rows(run):
        length = run.options.data.seq_length
        lines.append(f"warning: {cut} of {len(source)} rows are longer than --seq-length {length} and are cut")
    return lines + wasted(run)
