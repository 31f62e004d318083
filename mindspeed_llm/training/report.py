"""What a run tells its user: the log line, TensorBoard, the loss history and its picture."""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MEGABYTE = 1024 * 1024


@dataclass(frozen=True)
class StepRecord:
    """One logged step; the fields of upstream's log line, and ours behind them.

    Attributes:
        iteration: 1-based step. consumed_samples: rows since the run began.
        milliseconds: wall time per step since the last record. tokens_per_second: trained and padding tokens read,
            over all processes. skipped, nan: steps without an update, and those among them without a finite loss.
        memory: peak megabytes of this process (device memory; resident memory on a CPU).
        load_balancing_loss: of the last step, its coefficient aside; None where none is asked for.
        preferences: means since the last record of `training.preference.FIGURES`; empty without preferences.
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


def log_line(record: StepRecord, train_iters: int, global_batch_size: int, now: float, teraflops: float | None) -> str:
    """Upstream's log line with tokens/s, memory and time left behind it; the loss is printed whatever its value."""
    left = (train_iters - record.iteration) * record.milliseconds / 1000
    balance = record.load_balancing_loss
    balance_text = f" load_balancing_loss: {balance:.6E} |" if balance is not None else ""
    preferences = "".join(f" {name}: {value:.6E} |" for name, value in record.preferences.items())
    throughput = f" throughput per GPU (TFLOP/s/GPU): {teraflops:.1f} |" if teraflops is not None else ""
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
    """Writes records where the user looks; made on the rank that prints, absent on the others.

    Files in `log_dir`: `<name>.jsonl` (one record a line; a resumed run continues it), `<name>.png` (loss curve).
    """

    def __init__(
        self, log_dir: str, name: str, train_iters: int, global_batch_size: int, tensorboard_dir: str | None, bar: bool
    ) -> None:
        self.train_iters, self.global_batch_size = train_iters, global_batch_size
        self.folder = Path(log_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.history, self.picture = (self.folder / f"{name}.jsonl", self.folder / f"{name}.png")
        self.validations: list[tuple[int, float]] = []
        self.records: list[dict[str, Any]] = []
        self.writer = _tensorboard(tensorboard_dir) if tensorboard_dir else None
        self.bar = _progress_bar(train_iters) if bar and sys.stderr.isatty() else None

    def begin(self, iteration: int) -> None:
        """Keep the history up to `iteration` (a resumed run's past) and forget what came after it."""
        if self.history.is_file() and iteration:
            lines = self.history.read_text(encoding="utf-8").splitlines()
            past = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
            self.records = [r for r in past if r["iteration"] <= iteration]
        text = "".join(json.dumps(r) + "\n" for r in self.records)
        self.history.write_text(text, encoding="utf-8")
        if self.bar is not None:
            self.bar.update(iteration)

    def step(self, record: StepRecord, teraflops: float | None) -> None:
        """Print and store one record."""
        line = log_line(record, self.train_iters, self.global_batch_size, time.time(), teraflops)
        if self.bar is None:
            say(line)
        else:
            self.bar.write(line, file=sys.stdout)
            self.bar.update(record.iteration - self.bar.n)
        values = {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in asdict(record).items()}
        values |= values.pop("preferences")
        if record.load_balancing_loss is None:
            del values["load_balancing_loss"]
        self.records.append(values)
        with self.history.open("a", encoding="utf-8") as history:
            history.write(json.dumps(values) + "\n")
        if self.writer is not None:
            for tag, key in (("lm loss", "loss"), ("learning-rate", "learning_rate"), ("grad-norm", "grad_norm")):
                self.writer.add_scalar(tag, getattr(record, key), record.iteration)
            self.writer.add_scalar("tokens-per-second", record.tokens_per_second, record.iteration)
            for tag, value in record.preferences.items():
                self.writer.add_scalar(tag, value, record.iteration)

    def validation(self, iteration: int, loss: float, name: str = "validation") -> None:
        """Print and store the loss of rows held out; `name` says for what they are."""
        say(f" {name} loss at iteration {iteration} | lm loss value: {loss:.6E} | lm loss PPL: {_exp(loss):.6E} |")
        if name == "validation":
            self.validations.append((iteration, loss))
        if self.writer is not None:
            self.writer.add_scalar(f"lm loss {name}", loss, iteration)

    def end(self) -> None:
        """Draw the loss curve and close what is open."""
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()
        if self.records:
            draw_loss(self.records, self.validations, self.picture)
            say(f"loss curve: {self.picture}")


def _exp(loss: float) -> float:
    """Perplexity, infinite rather than overflowing."""
    return math.exp(loss) if loss < 700 else math.inf


def _tensorboard(folder: str) -> Any:
    """A TensorBoard writer; imported only when asked for."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


def _progress_bar(total: int) -> Any:
    """A bar on standard error; imported only when shown."""
    from tqdm import tqdm

    return tqdm(total=total, unit="step", dynamic_ncols=True)


def draw_loss(records: list[dict[str, Any]], validations: list[tuple[int, float]], path: Path) -> None:
    """Save the loss (and validation loss) over steps, with the learning rate below, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = [r["iteration"] for r in records]
    losses = [math.nan if r["loss"] is None else r["loss"] for r in records]
    top.plot(steps, losses, linewidth=1, label="training")
    if validations:
        top.plot(*zip(*validations, strict=True), "o-", markersize=4, label="validation")
        top.legend()
    top.set_ylabel("loss (nats per token)")
    top.grid(alpha=0.3)
    bottom.plot(steps, [r["learning_rate"] for r in records], linewidth=1, color="tab:gray")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
