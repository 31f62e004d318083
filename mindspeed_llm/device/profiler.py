"""Recording what a device does, step by step, as a trace that Chrome's and Perfetto's viewers read."""

from pathlib import Path
from typing import Protocol

from torch.profiler import ProfilerActivity, profile


class Profiler(Protocol):
    """Records from `start` to `stop`, which writes the trace."""

    def start(self) -> None:
        """Begin to record."""

    def stop(self) -> None:
        """End, and write what was recorded."""


class TorchProfiler:
    """torch's own profiler, with shapes, for CPUs and CUDA GPUs."""

    def __init__(self, path: Path, accelerator: bool = False) -> None:
        """Args:
        path: file of the trace (.json, or .json.gz to compress it).
        accelerator: record the kernels of a CUDA GPU too.
        """
        self.path = path
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if accelerator else [])]
        self.recording = profile(activities=kinds, record_shapes=True)

    def start(self) -> None:
        """Begin to record."""
        self.recording.start()

    def stop(self) -> None:
        """End, and write the trace; its folder is made."""
        self.recording.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.recording.export_chrome_trace(str(self.path))
