"""Watching a run from within: every step timed, judged and recorded, profiled and checked where asked for.

Nothing here waits for the device or talks to other ranks in an ordinary step, unless --measure-ceiling, --profile-steps
or --debug-checks ask for it.
"""

import time
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from megatron.core import parallel_state

from mindspeed_llm.arguments.parser import to_dict
from mindspeed_llm.arguments.programs import PosttrainOptions
from mindspeed_llm.data.report import read_report
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.training.ceiling import measure_ceiling
from mindspeed_llm.training.checks import DebugChecks
from mindspeed_llm.training.engine import Batch, StepResult
from mindspeed_llm.training.flops import StepFlops
from mindspeed_llm.training.oddities import Oddities, named, suspects, told_by_all
from mindspeed_llm.training.report import MEGABYTE, Report, StepRecord, averaged, say
from mindspeed_llm.training.report_page import Story
from mindspeed_llm.training.setup import Run
from mindspeed_llm.training.trackers import open_trackers


def run_folder(options: PosttrainOptions) -> Path:
    """Where a run's reports lie: a folder named like --save in --log-dir, with --add-version one for each version."""
    kept = 2 if options.checkpoint.add_version else 1
    parts = Path(options.checkpoint.save or "run").absolute().parts[1:]
    return Path(options.logging.log_dir).joinpath(*(parts[-kept:] or ("run",)))


def open_report(run: Run, lines: list[str]) -> Report | None:
    """The report, on the last rank; None on the others.

    Args:
        lines: what was said at the start; those that begin with "warning: " are listed as warnings.
    """
    if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
        return None
    options, folder = run.options, run_folder(run.options)
    prefixes = list(dict.fromkeys(str(prefix) for prefix in run.rows.parts.train.prefixes))
    settings = changed_settings(options)
    story = Story(
        title=folder.name,
        lines=[line for line in lines if not line.startswith("warning: ")],
        settings=settings,
        data={prefix: read_report(prefix) for prefix in prefixes},
        warnings=[line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")],
    )
    report = Report(folder, run.train_iters, run.global_batch_size, story, options.logging.progress)
    report.trackers = open_trackers(options.logging, folder.name, folder, settings, report.warn)
    return report


def changed_settings(options: PosttrainOptions) -> dict[str, Any]:
    """Options that differ from their defaults, as they are written on the command line."""
    found = {}
    for group, values in to_dict(options).items():
        cls = type(getattr(options, group, None))
        if isinstance(values, dict) and group in {one.name for one in fields(options)}:
            usual = cls()
            found |= {n: v for n, v in values.items() if hasattr(usual, n) and getattr(usual, n) != v}
    return {f"--{name.replace('_', '-')}": value for name, value in found.items()}


class Watch:
    """Follows a run; entered around its steps.

    A step is told in this order: `begins`, `has_rows`, `ends`; then, on all ranks if any of them saw something odd,
    `explain`; then `checked`.
    """

    def __init__(self, run: Run, report: Report | None) -> None:
        """Args: report: on the rank that prints, else None.

        Raises:
            UsageError: the steps to be profiled lie outside the run.
        """
        options = run.options.logging
        self.run, self.report = run, report
        self.flops = StepFlops(
            run.metadata.model, run.start.settings, run.options.training.recompute_granularity, run.options.prefers
        )
        self.oddities = Oddities(options.spike_threshold)
        self.since_line: list[StepRecord] = []
        self.first_line = True
        self.ceiling: float | None = None
        self.measures = options.measure_ceiling
        self.checks = DebugChecks(run.engine) if options.debug_checks else None
        self.profiler: Any = None
        self.began = self.got_rows = self.paused = 0.0
        self.batches: list[Batch] = []
        if options.profile_steps and options.profile_steps[0] > run.train_iters:
            raise UsageError(f"--profile-steps {options.profile_steps[0]}: the run has {run.train_iters} steps")

    def __enter__(self) -> "Watch":
        if self.report is not None:
            self.report.begin(self.run.progress.iteration)
        self.began = time.perf_counter()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop_profiler()
        if self.report is not None:
            if error is not None:
                self.report.story.warnings.append(f"the run ended with an error: {error}")
            self.report.end()

    def begins(self) -> None:
        """The next step is about to read its rows."""
        asked = self.run.options.logging.profile_steps
        if asked and self.profiler is None and asked[0] <= self.run.progress.iteration + 1 <= asked[1]:
            folder = Path(self.run.options.logging.profile_dir or run_folder(self.run.options) / "profile")
            self.profiler = self.run.device.profiler(folder / f"rank_{torch.distributed.get_rank()}.json")
            self.profiler.start()

    def has_rows(self, batches: list[Batch]) -> None:
        """The step has its rows and is about to compute."""
        self.batches, self.got_rows = batches, time.perf_counter()
        if self.measures:
            self._measure(batches[0]["tokens"].numel())
            spent = time.perf_counter() - self.got_rows
            self.began, self.got_rows, self.measures = self.began + spent, self.got_rows + spent, False

    def _measure(self, tokens: int) -> None:
        """Measure the ceiling, on all ranks at once, as they share what limits them."""
        torch.distributed.barrier()
        own = tokens // parallel_state.get_context_parallel_world_size()
        rates = measure_ceiling(self.run.engine, own, self.run.device)
        self.ceiling = rates[0].teraflops
        if self.report is not None:
            self.report.story.ceiling = self.ceiling
            say(f"measured ceiling in TFLOP/s per device: {rates[0]}; slowest product of the step: {rates[-1]}")

    def ends(self, result: StepResult, rate: float) -> bool:
        """Record a step that is done and counted; -> whether something is odd about it."""
        logging, iteration = self.run.options.logging, self.run.progress.iteration
        due = iteration % logging.log_interval == 0 or iteration == self.run.train_iters
        if due:
            self.run.device.synchronize()
        record = self._record(result, rate)
        self.since_line.append(record)
        if self.report is not None:
            self.report.step(record)
        if due:
            self._line(averaged(self.since_line))
            self.since_line = []
        if logging.profile_steps and iteration >= logging.profile_steps[1]:
            self._stop_profiler()
        self.paused = time.perf_counter()
        return self.oddities.look(result)

    def resumes(self) -> None:
        """What came behind the step, such as validating and saving, is over and counts for no step."""
        self.began += time.perf_counter() - self.paused

    def _record(self, result: StepResult, rate: float) -> StepRecord:
        now = time.perf_counter()
        seconds, waiting = now - self.began, self.got_rows - self.began
        self.began = now
        done, layout = self.run.progress, self.run.metadata.layout
        replicas = parallel_state.get_data_parallel_world_size()
        lengths = [one for batch in self.batches for one in executed_lengths(batch)]
        devices = layout.tp * layout.pp * parallel_state.get_context_parallel_world_size()
        teraflops = self.flops.step(lengths, result.tokens / replicas).total / devices / seconds / 1e12
        return StepRecord(
            iteration=done.iteration,
            consumed_samples=done.consumed_samples,
            milliseconds=seconds * 1000,
            learning_rate=rate,
            loss=result.loss,
            grad_norm=result.grad_norm,
            tokens_per_second=sum(lengths) * replicas / seconds,
            memory=self.run.device.memory()[1] / MEGABYTE,
            skipped=done.skipped,
            nan=done.nan,
            load_balancing_loss=result.balance,
            preferences=result.figures or {},
            tokens=sum(lengths) * replicas,
            trained_tokens=result.tokens,
            teraflops=teraflops,
            ceiling=teraflops / self.ceiling if self.ceiling else None,
            waiting=waiting * 1000,
            time=time.time(),
        )

    def _line(self, record: StepRecord) -> None:
        """The log line, and the memory once behind the first."""
        if self.report is not None:
            self.report.line(record, record.teraflops if self.run.options.logging.log_throughput else None)
            if self.first_line:
                now, peak = (value / MEGABYTE for value in self.run.device.memory())
                say(
                    f"[Rank {torch.distributed.get_rank()}] (after {record.iteration} iterations) memory (MB) | "
                    f"allocated: {now:.1f} | max allocated: {peak:.1f} | reserved: {now:.1f} | "
                    f"max reserved: {peak:.1f}"
                )
        self.first_line = False

    def explain(self) -> str:
        """Tell what is odd about the last step, with its rows; -> that sentence, the same on every rank. Collective."""
        run = self.run
        found, losses = told_by_all(run.engine, self.oddities.found)
        rows = run.feed.sampler.global_batch(run.progress.consumed_samples - run.global_batch_size)
        micro, replicas = run.feed.sampler.micro_batch_size, parallel_state.get_data_parallel_world_size()
        chosen, why = suspects(rows, losses, micro, replicas)
        text = f"step {run.progress.iteration}: {found}; {why}: {named(run.feed.source, chosen)}"
        if self.report is not None:
            self.report.warn(text, run.progress.iteration)
        return text

    def check(self) -> None:
        """--debug-checks, where asked for. Collective.

        Raises:
            InputError: something that must hold does not.
        """
        if self.checks is not None:
            self.checks.after(self.run.progress.iteration, self.batches)

    def too_many(self) -> bool:
        """Whether the run must end: --max-bad-steps in a row were not applied. The same on every rank."""
        most = self.run.options.logging.max_bad_steps
        return bool(most) and self.oddities.in_a_row >= most

    def end_of_run(self, last: str) -> InputError:
        """The error for `too_many`. Args: last: what `explain` said of the last step."""
        return InputError(
            f"--max-bad-steps {self.run.options.logging.max_bad_steps}: {self.oddities.in_a_row} steps in a row were "
            f"not applied, the last: {last}; repair or remove those rows, lower --lr, or check the base's weights"
        )

    def _stop_profiler(self) -> None:
        if self.profiler is None or self.profiler == "done":
            return
        self.profiler.stop()
        self.profiler = "done"


def executed_lengths(batch: Batch) -> list[int]:
    """Lengths of the sequences a micro-batch computes, padding included."""
    rows, length = batch["tokens"].shape
    return list(batch["packed"].segments.lengths) if "packed" in batch else [length] * rows
