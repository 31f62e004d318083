"""Services that follow a run besides the files it writes: TensorBoard, Weights & Biases, SwanLab. All are optional."""

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mindspeed_llm.arguments.logging import LoggingOptions

NAMES = {
    "loss": "lm loss",
    "learning_rate": "learning-rate",
    "grad_norm": "grad-norm",
    "tokens_per_second": "tokens-per-second",
    "teraflops": "tflops-per-device",
    "memory": "memory-megabytes",
    "milliseconds": "iteration-time-milliseconds",
    "load_balancing_loss": "load_balancing_loss",
}
"""Fields of a record that are followed, under the names megatron-core's trainer gives them where it has one."""


class Tracker(Protocol):
    """What follows a run."""

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, by name."""

    def close(self) -> None:
        """The run has ended."""


class TensorBoard:
    """Events in a folder, by torch's writer."""

    def __init__(self, folder: str) -> None:
        """Args: folder: made when missing."""
        self.writer = import_module("torch.utils.tensorboard").SummaryWriter(folder)

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """One scalar for each value."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class Service:
    """W&B or SwanLab, which share three functions: `init`, `log` and `finish`."""

    def __init__(self, module: Any, project: str, name: str, settings: Mapping[str, Any], named: str) -> None:
        """Args:
        module: the service's package. project, name: under which the run is filed.
        settings: of the run. named: the service's word for a run's name.
        """
        self.module = module
        module.init(project=project, config=dict(settings), **{named: name})

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """The values of one step."""
        self.module.log(dict(values), step=iteration)

    def close(self) -> None:
        """End the run there."""
        self.module.finish()


PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "swanlab": "swanlab"}
RUN_NAME = {"wandb": "name", "swanlab": "experiment_name"}


def open_trackers(
    options: LoggingOptions, name: str, folder: Path, settings: Mapping[str, Any], warn: Callable[[str], None]
) -> list[Tracker]:
    """The services asked for. One that is missing or does not answer is told in one line; the run goes on without it.

    Args:
        name: of the run. folder: of its files. settings: its options.
        warn: told what cannot be followed.
    """
    asked = list(dict.fromkeys(one for one in options.report_to if one != "none"))
    if options.tensorboard_dir and "tensorboard" not in asked:
        asked.append("tensorboard")
    found: list[Tracker] = []
    for one in asked:
        flag = "--tensorboard-dir" if one == "tensorboard" and options.tensorboard_dir else f"--report-to {one}"
        if find_spec(PACKAGES[one]) is None:
            warn(f"{flag}: {one} is not installed (pip install {PACKAGES[one]}); the run is not reported there")
            continue
        try:
            if one == "tensorboard":
                found.append(TensorBoard(options.tensorboard_dir or str(folder / "tensorboard")))
            else:
                found.append(Service(import_module(one), options.report_project, name, settings, RUN_NAME[one]))
        except Exception as error:  # no network, no login: a service must not end a run
            warn(f"{flag}: {one} does not answer ({_first_line(error)}); the run is not reported there")
    return found


def tell(trackers: list[Tracker], iteration: int, values: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """Give a step's finite numbers to all services; one that fails is closed off with a line, see `open_trackers`."""
    numbers = {
        NAMES.get(key, key): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    for one in list(trackers):
        try:
            one.log(iteration, numbers)
        except Exception as error:
            trackers.remove(one)
            warn(f"{type(one).__name__} failed at step {iteration} ({_first_line(error)}) and is not told any more")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
