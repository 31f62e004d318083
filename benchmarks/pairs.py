"""What benchmarks share that compare programs side by side: each in a process of its own, taking turns.

The one process that is asked works, the others wait for a line, so that a machine that drifts slows all of them. Ratios
are taken within a run only.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results.md"
THREADS = 2
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""Types as options name them, and as torch does."""
READY = {"ready": True}
Answer = Callable[[dict[str, Any]], None]


class Worker:
    """One side of a comparison in its own process, which serves through `channel`.

    Attributes:
        first: what it said when it was ready.
    """

    def __init__(self, words: Sequence[str], log: Path, threads: int = THREADS) -> None:
        """Start `python WORDS` and wait until it is ready.

        Args:
            log: where what it prints goes.
            threads: OMP_NUM_THREADS of the process.
        """
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with log.open("w", encoding="utf-8") as noise:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=noise,
                text=True,
                env=environment,
            )
        self.first = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
            raise SystemExit(f"a worker ended with status {self.process.wait()}:\n{tail}")
        return json.loads(line)

    def ask(self, request: Any = "step") -> dict[str, Any]:
        """One request, answered; whatever json can write."""
        self.process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def channel() -> tuple[Iterator[Any], Answer]:
    """A worker's side: (requests, how to answer one). What it prints from now on goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=out, flush=True)

    return (json.loads(line) for line in sys.stdin), answer


def machine() -> str:
    """Processor, cores and torch's version."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, torch {torch.__version__}"


def append(text: str) -> None:
    """Add a section to benchmarks/results.md."""
    with RESULTS.open("a", encoding="utf-8") as results:
        results.write("\n" + text)
