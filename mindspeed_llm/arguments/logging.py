"""What a run reports."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError

SERVICES = ("none", "tensorboard", "wandb", "swanlab")


@dataclass
class LoggingOptions:
    """Reports."""

    log_interval: int = option(1, help="Steps between log lines; logging.jsonl has every step.", unit="steps")
    log_throughput: bool = option(False, help="Add the executed TFLOP/s per device to the log line.")
    log_dir: str = option(
        "logs", help="Folder in which a run's own folder (logging.jsonl, report.html, pictures) is made."
    )
    tensorboard_dir: str | None = option(None, help="Folder for TensorBoard events; left out, none are written.")
    report_to: list[str] = option(
        ["none"], help="Services that get every log line's numbers besides the files of --log-dir.", choices=SERVICES
    )
    report_project: str = option("mindspeed-llm", help="Project under which W&B and SwanLab file the run.")
    progress: bool = option(True, help="Show a progress bar where standard error is a terminal.")
    max_bad_steps: int = option(
        20,
        help="Steps in a row with a loss or gradients that are not finite (none of them is applied) after which the "
        "run is saved and ends; 0 never ends it.",
        unit="steps",
    )
    spike_threshold: float = option(
        10.0,
        help="A step is told, with its rows, when its loss or gradient norm is so many robust deviations above the "
        "median of the last 50; 0 tells none.",
        unit="deviations",
    )
    measure_ceiling: bool = option(
        False, help="Measure at the start how fast this device multiplies matrices of the step's own shapes."
    )
    profile_steps: list[int] | None = option(
        None, help="First and last step to record with the profiler, a trace per rank.", nargs=2
    )
    profile_dir: str | None = option(None, help="Folder for the traces; left out, profile/ in the run's own folder.")
    debug_checks: bool = option(
        False,
        help="After every step, check that replicas hold the same parameters and rows and that the frozen base has not "
        "changed. Slow.",
    )

    def check(self) -> None:
        """Raise UsageError for counts below their least value and a range of steps that is none."""
        if self.log_interval < 1:
            raise UsageError(f"--log-interval {self.log_interval}: must be at least 1")
        for name in ("max_bad_steps", "spike_threshold"):
            value = getattr(self, name)
            if value < 0:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must not be negative")
        if self.profile_steps is not None:
            first, last = self.profile_steps
            if not 1 <= first <= last:
                raise UsageError(f"--profile-steps {first} {last}: wanted is 1 <= first <= last")
        if len(self.report_to) > 1 and "none" in self.report_to:
            raise UsageError(f"--report-to {' '.join(self.report_to)}: none contradicts the others")
