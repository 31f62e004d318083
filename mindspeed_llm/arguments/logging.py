"""What a run reports."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError


@dataclass
class LoggingOptions:
    """Reports."""

    log_interval: int = option(1, help="Steps between log lines.", unit="steps")
    log_throughput: bool = option(False, help="Add the model's TFLOP/s per device to the log line.")
    log_dir: str = option("logs", help="Folder for the loss curve; made when missing.")
    tensorboard_dir: str | None = option(None, help="Folder for TensorBoard events; left out, none are written.")
    progress: bool = option(True, help="Show a progress bar where standard error is a terminal.")

    def check(self) -> None:
        """Raise UsageError for an interval below one step."""
        if self.log_interval < 1:
            raise UsageError(f"--log-interval {self.log_interval}: must be at least 1")
