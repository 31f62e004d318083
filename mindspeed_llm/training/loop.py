"""The run itself: step, report, validate, save, stop when asked."""

import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType

import torch
from megatron.core import parallel_state

from mindspeed_llm.arguments.parser import to_dict
from mindspeed_llm.lora.config import described
from mindspeed_llm.training.engine import Batch, StepResult, evaluate, train_step
from mindspeed_llm.training.flops import step_flops
from mindspeed_llm.training.report import MEGABYTE, Report, StepRecord, say
from mindspeed_llm.training.retention import BEST, validated
from mindspeed_llm.training.saving import Saver
from mindspeed_llm.training.setup import Run, count_cut_rows, finished

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

    def agreed(self, device: torch.device, writing: bool) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether any is writing; the same answers on every rank."""
        flags = torch.tensor([float(self.asked), float(writing)], device=device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        return bool(flags[0].item()), bool(flags[1].item())


def train(run: Run, report: Report | None) -> bool:
    """Train to the end, or to a stop request; -> whether the run is complete.

    Args:
        report: on the rank that prints, else None.
    """
    place = run.feed.device
    if report is not None:
        report.begin(run.progress.iteration)
    window, saver, stopping = _Window(run), Saver(run), False
    saver.put_right()
    ended = bool(finished(run))
    if ended and run.first_rank:
        say(f"{run.start.resume.folder} {finished(run)}")
    with StopRequest() as stop:
        while not ended:
            batches = run.feed.batches(run.progress.consumed_samples)
            rate = run.schedule.set(run.progress.iteration + 1)
            result = train_step(run.engine, batches)
            advance(run, result)
            window.add(result, batches)
            iteration = run.progress.iteration
            if iteration % run.options.logging.log_interval == 0 or iteration == run.train_iters:
                window.flush(report, rate)
            loss = validate(run, report)
            gained = count_validation(run, loss)
            stopping, writing = stop.agreed(place, saver.writing)
            saver.progressed(writing)
            ended = stopping or bool(finished(run))
            every = run.options.checkpoint.save_interval
            if ended or gained or (every and iteration % every == 0):
                saver.save(loss, last=ended)
            window.resume()
        saver.finish()
    for feed in (run.feed, run.validation, run.test):
        if feed is not None:
            feed.close()
    if report is not None:
        report.end()
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


class _Window:
    """Steps since the last log line: their time, tokens and losses."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.losses: list[float] = []
        self.figures: list[dict[str, float]] = []
        self.tokens, self.flops, self.grad_norm = 0, 0.0, 0.0
        self.balance: float | None = None
        self.first = True
        self.began = self.paused = time.perf_counter()

    def add(self, result: StepResult, batches: list[Batch]) -> None:
        """Count one step; tokens read by this replica stand for all of them."""
        kind = self.run.start.settings is not None, self.run.options.prefers
        for batch in batches:
            rows, length = batch["tokens"].shape
            self.tokens += rows * length
            lengths = batch["packed"].segments.lengths if "packed" in batch else (length,) * rows
            self.flops += sum(step_flops(self.run.metadata.model, one, one, *kind) for one in lengths)
        self.losses.append(result.loss)
        self.figures.append(result.figures or {})
        self.paused = time.perf_counter()
        self.grad_norm, self.balance = result.grad_norm, result.balance

    def flush(self, report: Report | None, rate: float) -> None:
        """Print the steps as one line and begin anew."""
        self.run.device.synchronize()
        seconds = time.perf_counter() - self.began
        replicas = parallel_state.get_data_parallel_world_size()
        done, layout = self.run.progress, self.run.metadata.layout
        if report is not None:
            finite = [loss for loss in self.losses if math.isfinite(loss)]
            record = StepRecord(
                iteration=done.iteration,
                consumed_samples=done.consumed_samples,
                milliseconds=seconds * 1000 / len(self.losses),
                learning_rate=rate,
                loss=sum(finite) / len(finite) if finite else math.nan,
                grad_norm=self.grad_norm,
                tokens_per_second=self.tokens * replicas / seconds,
                memory=self.run.device.memory()[1] / MEGABYTE,
                skipped=done.skipped,
                nan=done.nan,
                load_balancing_loss=self.balance,
                preferences=mean_figures(self.figures),
            )
            context = parallel_state.get_context_parallel_world_size()
            throughput = self.flops / seconds / (layout.tp * layout.pp * context) / 1e12
            report.step(record, throughput if self.run.options.logging.log_throughput else None)
            if self.first:
                now, peak = (value / MEGABYTE for value in self.run.device.memory())
                rank = torch.distributed.get_rank()
                say(
                    f"[Rank {rank}] (after {done.iteration} iterations) memory (MB) | allocated: {now:.1f} | "
                    f"max allocated: {peak:.1f} | reserved: {now:.1f} | max reserved: {peak:.1f}"
                )
        self.first = False
        self.losses, self.figures, self.tokens, self.flops = [], [], 0, 0.0
        self.began = self.paused = time.perf_counter()

    def resume(self) -> None:
        """Leave the time since the last step, which validated and saved, out."""
        self.began += time.perf_counter() - self.paused


def mean_figures(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over steps of what was told of preferences; empty where nothing was."""
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]} if steps else {}


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


def announce(run: Run) -> None:
    """What is about to happen, in a few lines; on rank 0."""
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
    for line in lines:
        say(line)
