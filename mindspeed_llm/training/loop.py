"""The run itself: step, report, validate, save, stop when asked."""

import math
import os
import signal
from dataclasses import replace
from types import FrameType

import torch
from megatron.core import parallel_state

from mindspeed_llm.arguments.parser import to_dict
from mindspeed_llm.lora.config import described
from mindspeed_llm.training import advice
from mindspeed_llm.training.engine import StepResult, evaluate, train_step
from mindspeed_llm.training.report import Report, say
from mindspeed_llm.training.retention import BEST, validated
from mindspeed_llm.training.saving import Saver
from mindspeed_llm.training.setup import Run, count_cut_rows, finished
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

    def agreed(self, device: torch.device, *seen: bool) -> tuple[bool, ...]:
        """Whether any rank was asked to stop, and for each of `seen` whether it holds on any; alike on every rank."""
        flags = torch.tensor([float(self.asked), *map(float, seen)], device=device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        return tuple(map(bool, flags.tolist()))


def train(run: Run, report: Report | None) -> bool:
    """Train to the end, or to a stop request; -> whether the run is complete.

    Args:
        report: on the rank that prints, else None.
    """
    place, saver = run.feed.device, Saver(run)
    applied = stopping = broken = False
    saver.put_right()
    ended = bool(finished(run))
    if ended and run.first_rank:
        say(f"{run.start.resume.folder} {finished(run)}")
    with Watch(run, report) as watch, StopRequest() as stop:
        while not ended:
            watch.begins()
            batches = run.feed.batches(run.progress.consumed_samples)
            watch.has_rows(batches)
            rate = run.schedule.set(run.progress.iteration + 1)
            result = train_step(run.engine, batches)
            advance(run, result)
            odd = watch.ends(result, rate)
            iteration = run.progress.iteration
            applied = applied or result.updated
            watch.check()
            loss = validate(run, report)
            gained = count_validation(run, loss)
            stopping, writing, odd = stop.agreed(place, saver.writing, odd)
            saver.progressed(writing)
            told, broken = watch.explain() if odd else "", watch.too_many()
            ended = stopping or bool(finished(run)) or broken
            every = run.options.checkpoint.save_interval
            if (ended and (applied or not broken)) or gained or (every and iteration % every == 0):
                saver.save(loss, last=ended)
                applied = False
            watch.resumes()
        saver.finish()
        if broken:
            raise watch.end_of_run(told)
    for feed in (run.feed, run.validation, run.test):
        if feed is not None:
            feed.close()
    if run.first_rank:
        for line in closing(run):
            say(line)
    return not stopping or bool(finished(run))


def count_validation(run: Run, loss: float | None) -> bool:
    """Count a validation, if there was one; -> whether it asks for a checkpoint."""
    if loss is None:
        return False
    options = run.options.checkpoint
    run.progress = validated(run.progress, loss, options.early_stopping_threshold)
    return options.saves_best and run.progress.without_gain == 0


def closing(run: Run) -> list[str]:
    """What a finished run says about its validation losses."""
    done, lines = run.progress, []
    if finished(run) and done.iteration < run.train_iters:
        lines.append(f"stopped early at step {done.iteration}: {done.without_gain} validations had no lower loss")
    if done.saved_best:
        link = os.path.join(run.options.checkpoint.save or "", BEST)
        lines.append(f"best checkpoint: {link}, validation loss {done.saved_best_loss:.6E} at step {done.saved_best}")
    return lines


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


def validate(run: Run, report: Report | None) -> float | None:
    """Losses of the rows held out: for validation every --eval-interval steps and at the end, for the test at the end.

    Over all of these rows, or the first --eval-iters global batches. -> the validation loss, None where none was due.
    """
    found = None
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
        if name == "validation":
            found = loss
    return found


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
    if data.no_pad_to_seq_lengths or data.lays_out_flat or run.options.prefers:
        return lines
    return lines + advice.padding_advice(run.feed.source.lengths, data.seq_length)


def preference_lines(run: Run) -> list[str]:
    """What is learnt from pairs, and from which reference; nothing in other stages."""
    chosen = run.options.preference
    if not run.options.prefers:
        return []
    terms = [f"{chosen.dpo_loss_type} loss, beta {chosen.dpo_beta:g}"]
    terms += [f"label smoothing {chosen.dpo_label_smoothing:g}"] if chosen.dpo_label_smoothing else []
    terms += [f"SFT term {chosen.pref_ftx:g}"] if chosen.pref_ftx else []
    lines = [f"DPO: {', '.join(terms)}; the reference is {run.start.base_path} without adapter"]
    if run.start.adapter is not None and run.start.resume is None:
        lines.append(
            f"note: the adapter {run.options.lora.lora_load} is trained on but is no part of the reference; to prefer "
            "over the tuned model, merge it with convert_ckpt.py and give the result to --load"
        )
    return lines


def announcement(run: Run) -> list[str]:
    """What is about to happen, in a few lines."""
    world = torch.distributed.get_world_size()
    layout, settings = run.metadata.layout, run.start.settings
    parameters = sum(p.numel() for chunk in run.engine.chunks for p in chunk.parameters() if p.requires_grad)
    what = "full tuning"
    if settings is not None:
        what = described(settings, run.options.lora.lora_fusion, run.options.training.dtype_name)
    source = run.feed.source
    pieces = parallel_state.get_context_parallel_world_size()
    context = f" CP{pieces}" if pieces > 1 else ""
    noun, tokens = ("pairs", "") if run.options.prefers else ("rows", f", {int(source.lengths.sum()):,} tokens")
    lines = [
        f"{what}: {parameters:,} trainable parameters on this rank, {run.metadata.model.dtype}, {run.device.name}",
        f"{layout}{context} DP{parallel_state.get_data_parallel_world_size()} on {world} processes; "
        f"base {run.start.base_path}",
        *preference_lines(run),
        f"{len(source):,} training {noun}{tokens}; {run.train_iters} steps of "
        f"{run.global_batch_size} {noun} = {run.train_iters * run.global_batch_size / len(source):.2f} epochs",
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
