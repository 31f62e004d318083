"""What a run tells its user: the log line, logging.jsonl, the services that follow it, pictures and report.html."""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mindspeed_llm.checkpoint.atomic import write_text
from mindspeed_llm.training import charts
from mindspeed_llm.training.report_page import Story, page
from mindspeed_llm.training.trackers import NAMES, Tracker, tell

MEGABYTE = 1024 * 1024
VALIDATION = "validation_loss"  # of a line of logging.jsonl that stands behind its step's own
PAGE_SECONDS = 20.0  # at least between two writings of the page while the run goes on
PAGE_SHARE = 100  # and so many times as long as writing it takes: 1 % of the run at most


@dataclass(frozen=True)
class StepRecord:
    """One step, or the mean of the steps since the last log line; upstream's fields, and ours behind them.

    Attributes:
        iteration: 1-based step. consumed_samples: rows since the run began.
        milliseconds: wall time per step. tokens_per_second: trained and padding tokens read, over all processes.
        skipped, nan: steps without an update so far, and those among them without a finite loss.
        memory: peak megabytes of this process (device memory; resident memory on a CPU).
        load_balancing_loss: of the last step, its coefficient aside; None where none is asked for.
        preferences: means over steps of `training.preference.FIGURES`; empty without preferences.
        tokens, trained_tokens: read, padding included, and with a label, over all processes.
        teraflops: executed per device, see `training.flops`.
        ceiling: those as a share of the measured ceiling; None where it was not measured.
        waiting: milliseconds of the step spent waiting for its rows.
        time: end of the step, seconds since 1970.
    """

    iteration: int
    consumed_samples: int
    milliseconds: float
    learning_rate: float
    loss: float
    grad_norm: float
    tokens_per_second: float
    memory: float
    skipped: int
    nan: int
    load_balancing_loss: float | None = None
    preferences: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    teraflops: float = 0.0
    ceiling: float | None = None
    waiting: float = 0.0
    time: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Its fields; what is not finite becomes None, what is not asked for is left out."""
        optional = ("load_balancing_loss", "ceiling")
        values = {k: v for k, v in asdict(self).items() if v is not None or k not in optional}
        values |= values.pop("preferences")
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def averaged(records: Sequence[StepRecord]) -> StepRecord:
    """Steps as one record: the last one's, with the mean of finite losses, of times and of rates over all of them."""
    seconds = sum(r.milliseconds for r in records) / 1000
    finite = [r.loss for r in records if math.isfinite(r.loss)]
    work = sum(r.teraflops * r.milliseconds for r in records) / 1000

    def share(total: float) -> float:
        return total / seconds if seconds else 0.0

    last, rate = records[-1], share(work)
    ceiling = rate * last.ceiling / last.teraflops if last.ceiling and last.teraflops else last.ceiling
    return replace(
        last,
        milliseconds=seconds * 1000 / len(records),
        loss=sum(finite) / len(finite) if finite else math.nan,
        tokens_per_second=share(sum(r.tokens for r in records)),
        teraflops=rate,
        ceiling=ceiling,
        preferences={
            name: sum(r.preferences[name] for r in records) / len(records) for name in records[-1].preferences
        },
    )


def log_line(record: StepRecord, train_iters: int, global_batch_size: int, now: float, teraflops: float | None) -> str:
    """Upstream's log line with tokens/s, memory and time left behind it; the loss is printed whatever its value."""
    left = (train_iters - record.iteration) * record.milliseconds / 1000
    balance = record.load_balancing_loss
    balance_text = f" load_balancing_loss: {balance:.6E} |" if balance is not None else ""
    preferences = "".join(f" {name}: {value:.6E} |" for name, value in record.preferences.items())
    throughput = f" throughput per GPU (TFLOP/s/GPU): {teraflops:.1f} |" if teraflops is not None else ""
    ceiling = f" of the measured ceiling (%): {100 * record.ceiling:.1f} |" if record.ceiling is not None else ""
    return (
        f" [{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))}]"
        f" iteration {record.iteration:8d}/{train_iters:8d} |"
        f" consumed samples: {record.consumed_samples:12d} |"
        f" elapsed time per iteration (ms): {record.milliseconds:.1f} |"
        f"{throughput}"
        f" learning rate: {record.learning_rate:.6E} |"
        f" global batch size: {global_batch_size:5d} |"
        f" lm loss: {record.loss:.6E} |"
        f"{balance_text}"
        f"{preferences}"
        f" loss scale: {1.0:.1f} |"
        f" grad norm: {record.grad_norm:.3f} |"
        f" number of skipped iterations: {record.skipped:3d} |"
        f" number of nan iterations: {record.nan:3d} |"
        f" tokens/s: {record.tokens_per_second:.0f} |"
        f"{ceiling}"
        f" memory (MB): {record.memory:.0f} |"
        f" time left: {duration(left)} |"
    )


def duration(seconds: float) -> str:
    """3661 -> "1:01:01"."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def say(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)


class Report:
    """Writes what a run does where the user looks; made on the rank that prints, absent on the others.

    Files in `folder`: `logging.jsonl` (one step a line; a resumed run continues it), `report.html` (brought up to date
    while the run goes on) and, at the end, a PNG for each of `charts.CHARTS` where matplotlib is installed.
    """

    def __init__(self, folder: Path, train_iters: int, global_batch_size: int, story: Story, bar: bool) -> None:
        """Args:
        story: what the page says besides the steps; warnings are added to it.
        bar: show a progress bar where standard error is a terminal.
        """
        self.train_iters, self.global_batch_size = train_iters, global_batch_size
        self.folder, self.story = folder, story
        self.folder.mkdir(parents=True, exist_ok=True)
        self.history = self.folder / "logging.jsonl"
        self.validations: list[tuple[float, float]] = []
        self.records: list[dict[str, Any]] = []
        self.trackers: list[Tracker] = []
        self.bar = _progress_bar(train_iters) if bar and sys.stderr.isatty() else None
        self.open: Any = None
        self.page_due = 0.0

    def begin(self, iteration: int) -> None:
        """Keep the history up to `iteration` (a resumed run's past) and forget what came after it."""
        if self.history.is_file() and iteration:
            lines = self.history.read_text(encoding="utf-8").splitlines()
            past = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
            self.records = [r for r in past if r["iteration"] <= iteration]
        write_text(self.history, "".join(json.dumps(r) + "\n" for r in self.records))
        self.validations = [(r["iteration"], r[VALIDATION]) for r in self.records if VALIDATION in r]
        self.records = [r for r in self.records if "loss" in r]
        self.open = self.history.open("a", encoding="utf-8")
        if self.bar is not None:
            self.bar.update(iteration)

    def _write(self, values: dict[str, Any]) -> None:
        self.open.write(json.dumps(values) + "\n")
        self.open.flush()

    def step(self, record: StepRecord) -> None:
        """Store one step."""
        self.records.append(record.to_json())
        self._write(self.records[-1])
        now = time.perf_counter()
        if now >= self.page_due:
            self.write_page()
            spent = time.perf_counter() - now
            self.page_due = now + max(PAGE_SECONDS, PAGE_SHARE * spent)

    def line(self, record: StepRecord, teraflops: float | None) -> None:
        """Print a log line and tell the services the same numbers."""
        line = log_line(record, self.train_iters, self.global_batch_size, time.time(), teraflops)
        self._print(line)
        if self.bar is not None:
            self.bar.update(record.iteration - self.bar.n)
        followed = {key: value for key, value in record.to_json().items() if key in (*NAMES, *record.preferences)}
        tell(self.trackers, record.iteration, followed, self.warn)

    def _print(self, line: str) -> None:
        if self.bar is None:
            say(line)
        else:
            self.bar.write(line, file=sys.stdout)

    def warn(self, text: str, step: int | None = None) -> None:
        """Print a warning and keep it for the page; `step` marks the curves there."""
        self._print(f"warning: {text}")
        self.story.warnings.append(text)
        if step is not None:
            self.story.marks.append(step)

    def validation(self, iteration: int, loss: float, name: str = "validation") -> None:
        """Print and store the loss of rows held out; `name` says for what they are."""
        say(f" {name} loss at iteration {iteration} | lm loss value: {loss:.6E} | lm loss PPL: {_exp(loss):.6E} |")
        if math.isfinite(loss):
            self._write({"iteration": iteration, f"{name}_loss": loss, "time": time.time()})
        if name == "validation":
            self.validations.append((iteration, loss))
        tell(self.trackers, iteration, {f"lm loss {name}": loss}, self.warn)

    def write_page(self) -> None:
        """Bring report.html up to date."""
        finite = [(x, y) for x, y in self.validations if math.isfinite(y)]
        write_text(self.folder / "report.html", page(self.records, finite, self.story, self.train_iters))

    def end(self) -> None:
        """Draw the curves, write the page and close what is open; also after an error."""
        if self.bar is not None:
            self.bar.close()
        for one in self.trackers:
            one.close()
        if self.open is not None:
            self.open.close()
        if self.records:
            finite = [(x, y) for x, y in self.validations if math.isfinite(y)]
            files = charts.draw_all(self.records, finite, self.folder)
            self.write_page()
            if files:
                say(f"loss curve: {files[0]}")
            say(f"report: {self.folder / 'report.html'}")


def _exp(loss: float) -> float:
    """Perplexity, infinite rather than overflowing."""
    return math.exp(loss) if loss < 700 else math.inf


def _progress_bar(total: int) -> Any:
    """A bar on standard error; imported only when shown."""
    from tqdm import tqdm

    return tqdm(total=total, unit="step", dynamic_ncols=True)
