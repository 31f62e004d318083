"""Runs killed at named points and continued, against an undisturbed run: weights and losses have to be equal.

    python benchmarks/kill_resume.py [--kills 20] [--seed 0] [--only mid-write one-rank ...]

A kill is SIGKILL to one process, at a moment drawn from the seed:

    mid-write        its file of a checkpoint is half written
    before-rename    the checkpoint is complete, its folder not yet named
    before-tracker   the folder is named, the tracker is not yet written
    mid-optimizer    Adam has stepped, the model's weights have not followed
    mid-removal      a checkpoint beyond --save-total-limit is half removed
    mid-export       half of the tensors of --save-safetensors' HF folder are written, in the background

In runs of two processes the other one has to end by itself. The command is then repeated with --auto-resume. Kills
alternate between the formats torch and torch_dist, saving at once and in the background, and one process, TP2 and DP2
with the distributed optimizer; to five kills comes one more, mid-export. Processes are forked from one that has
imported everything; that is all that differs from a launcher's.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

STEPS, INTERVAL, LIMIT = 6, 2, 2
GRACE_SECONDS = 60.0
"""How long the processes that were not killed may take to end."""
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "TP2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "DP2": (2, ["--use-distributed-optimizer"]),
}
VARIANTS = (
    ("one process", ["--ckpt-format", "torch"]),
    ("TP2", ["--ckpt-format", "torch_dist", "--async-save"]),
    ("one process", ["--ckpt-format", "torch_dist", "--async-save"]),
    ("DP2", ["--ckpt-format", "torch", "--async-save"]),
)
EXPORT = ["--save-safetensors", "--lora-ckpt-filter", "false"]
"""Options of the runs that are killed mid-export."""


@dataclass(frozen=True)
class Kill:
    """Where a run is killed: the point, which of its occurrences (from 1), and the rank."""

    point: str
    call: int
    rank: int


def die() -> None:
    """End this process as the system ends one that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` is `make(original)` for a while."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def counted(call: int, act: Callable[..., Any]) -> Callable[[Any], Any]:
    """Makes a function whose `call`-th call is `act(original, *arguments)`."""
    seen = [0]

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **more: Any) -> Any:
            seen[0] += 1
            return act(original, *arguments, **more) if seen[0] == call else original(*arguments, **more)

        return called

    return make


def half_written(write: Callable[..., Any], folder: Path, *arguments: Any) -> None:
    """Write, cut the largest file of this rank in half, die."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    write(folder, *arguments)
    own = [path for path in folder.rglob("*") if path.is_file() and before.get(path) != path.stat().st_mtime_ns]
    largest = max(own, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    die()


def half_exported(write: Callable[..., Any], files: Any) -> None:
    """Write half of this rank's tensors of an HF folder, die."""
    tensors = list(files.tensors)
    files.tensors = tensors[: len(tensors) // 2]
    write(files)
    die()


def half_removed(remove: Callable[..., Any], folder: Path, *arguments: Any, **more: Any) -> None:
    """Remove some of a folder's files, die."""
    if not folder.exists():
        return remove(folder, *arguments, **more)
    next(path for path in sorted(folder.rglob("*")) if path.is_file()).unlink()
    return die()


def planted(kill: Kill) -> Any:
    """A context in which this process dies at the point."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from mindspeed_llm.checkpoint.atomic import StagedDirectory
    from mindspeed_llm.training import export, retention, saving

    act = counted(kill.call, lambda *_, **__: die())
    if kill.point == "mid-write":
        both = contextlib.ExitStack()
        for name in ("write_rank_file", "write_shares"):
            both.enter_context(replaced(saving, name, counted(kill.call, half_written)))
        return both
    if kill.point == "mid-export":
        return replaced(export.ModelExport, "write", counted(kill.call, half_exported))
    if kill.point == "before-rename":
        return replaced(StagedDirectory, "publish", act)
    if kill.point == "before-tracker":
        return replaced(saving, "write_tracker", act)
    if kill.point == "mid-removal":
        stand_in = type("shutil", (), {"rmtree": staticmethod(shutil.rmtree)})
        return replaced(retention, "shutil", lambda _: dying_shutil(stand_in))
    seen = [0]

    def stepped(*_: Any) -> None:
        seen[0] += 1
        if seen[0] == kill.call:
            die()

    hooked = contextlib.ExitStack()
    hooked.callback(register_optimizer_step_post_hook(stepped).remove)
    return hooked


def dying_shutil(stand_in: type) -> type:
    """`shutil` for `retention`, whose removal of an existing folder dies halfway."""
    whole = stand_in.rmtree
    stand_in.rmtree = staticmethod(lambda folder, *rest, **more: half_removed(whole, folder, *rest, **more))
    return stand_in


def free_port() -> int:
    """A port nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_process(rank: int, size: int, port: int, argv: list[str], log: Path, kill: Kill | None) -> int:
    """Fork one rank of a run; -> its process id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "MINDSPEED_LLM_DEVICE": "cpu"})
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
        os.environ.update({"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)})
        from mindspeed_llm.cli import run
        from mindspeed_llm.training.posttrain import main

        sys.argv = ["posttrain_gpt.py", *argv]
        with planted(kill) if kill is not None and kill.rank == rank else contextlib.nullcontext():
            run(main)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_job(size: int, argv: list[str], log: Path, kill: Kill | None = None) -> tuple[list[int], float]:
    """Run all ranks to their end; -> (exit codes, seconds from the first end to the last)."""
    port = free_port()
    left = {rank_process(rank, size, port, argv, log, kill): rank for rank in range(size)}
    codes, first = [0] * size, 0.0
    while left:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            codes[left.pop(process)] = os.waitstatus_to_exitcode(status)
            first = first or time.monotonic()
        elif first and time.monotonic() - first > GRACE_SECONDS:
            for one in left:
                os.kill(one, signal.SIGKILL)
            raise SystemExit(f"{log}: ranks {sorted(left.values())} did not end within {GRACE_SECONDS:.0f} s")
        else:
            time.sleep(0.02)
    return codes, time.monotonic() - first


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A tiny Qwen3 in an HF folder, and prepared rows; -> where they lie."""
    import numpy as np

    from mindspeed_llm.data.indexed_file import IndexedFileWriter
    from mindspeed_llm.quickstart.model import TinySize, write_model

    model, prefix = folder / "hf", folder / "rows"
    model.mkdir()
    write_model(model, TinySize(2, 64, 96, 4, 2, 16, 64), 300, 1, 2, 0)
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 40, 29)
    tokens = draw.integers(3, 300, int(lengths.sum())).astype(np.int32)
    for field in ("input_ids", "attention_mask", "labels"):
        with IndexedFileWriter(f"{prefix}_packed_{field}_document") as writer:
            writer.add(np.ones_like(tokens) if field == "attention_mask" else tokens, lengths.tolist())
    return model, prefix


def command(model: Path, prefix: Path, save: Path, *more: str) -> list[str]:
    """The words of a run."""
    words = ["--stage", "sft", "--load", model, "--data-path", prefix, "--save", save, "--log-dir", save.parent]
    words += ["--seq-length", 64, "--micro-batch-size", 1, "--global-batch-size", 4, "--train-iters", STEPS]
    words += ["--lr", 0.01, "--min-lr", 0.001, "--no-pad-to-seq-lengths", "--lora-r", 4, "--lora-alpha", 8]
    words += ["--lora-dropout", 0.1, "--lora-target-modules", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    words += ["--save-interval", INTERVAL, "--save-total-limit", LIMIT, *more]
    return [str(word) for word in words]


def result(save: Path) -> dict[str, Any]:
    """Losses, weights and optimizer state of a finished run, by name."""
    from mindspeed_llm.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(save)
    found: dict[str, Any] = {"iteration": int(checkpoint.first["iteration"])}
    for line in (save.parent / save.name / "logging.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found[f"loss {record['iteration']}"] = record["loss"]
    sources = {"weights": checkpoint.lora()}
    sources |= {field: checkpoint.section("optimizer", field) for field in ("master", "exp_avg", "exp_avg_sq")}
    for kind, source in sources.items():
        found |= {f"{kind} {name}": source.read(name).numpy().tobytes() for name in source.names()}
    return found | {f"{path.parent.name}/{path.name}": path.read_bytes() for path in checkpoint.folder.glob("hf/*")}


def planned(kills: int, seed: int, only: list[str]) -> list[tuple[str, list[str], Kill]]:
    """(layout, options, kill) of every run."""
    draw = random.Random(seed)
    calls = {"mid-write": 3, "before-rename": 3, "before-tracker": 3, "mid-optimizer": STEPS, "mid-removal": 1}
    chosen = []
    for number in range(kills):
        layout, more = VARIANTS[(number // len(calls) + number % len(calls)) % len(VARIANTS)]
        point = list(calls)[number % len(calls)]
        everywhere = point == "mid-optimizer" or (point == "mid-write" and layout == "TP2")
        rank = LAYOUTS[layout][0] - 1 if everywhere else 0
        chosen.append((layout, more, Kill(point, draw.randint(1, calls[point]), rank)))
    for number in range(kills // len(calls)):
        layout, more = VARIANTS[1:][number % 3]  # those that save in the background
        rank = LAYOUTS[layout][0] - 1
        chosen.append((layout, [*more, *EXPORT], Kill("mid-export", draw.randint(1, 3), rank)))
    return [
        one for one in chosen if not only or one[2].point in only or ("one-rank" in only and one[0] != "one process")
    ]


def one_kill(folder: Path, inputs: tuple[Path, Path], layout: str, more: list[str], kill: Kill) -> tuple[Path, float]:
    """Kill a run and continue it; -> (its folder, seconds until the rest of it had ended)."""
    size, flags = LAYOUTS[layout]
    save = folder / "run"
    argv, log = command(*inputs, save, *flags, *more), folder / "log"
    codes, seconds = run_job(size, argv, log, kill)
    if codes[kill.rank] != -signal.SIGKILL:
        raise SystemExit(f"{log}: {kill} was not reached: exit codes {codes}\n{log.read_text()[-3000:]}")
    codes, _ = run_job(size, [*argv, "--auto-resume"], log)
    if any(codes):
        raise SystemExit(f"{log}: not continued after {kill}: exit codes {codes}\n{log.read_text()[-3000:]}")
    if left := [path.name for path in save.glob(".*")]:
        raise SystemExit(f"{save}: {left} lie about after {kill}")
    return save, seconds


def main() -> int:
    """Kill, continue, compare; -> how many results differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="points, or one-rank for runs of two processes")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from mindspeed_llm import device
    from mindspeed_llm.device import quiet

    device.select("cpu")
    quiet.silence()
    importlib.import_module("mindspeed_llm.training.loop")  # before the forks, once for all
    differing = 0
    whole: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        inputs = make_inputs(Path(place))
        for number, (layout, more, kill) in enumerate(planned(options.kills, options.seed, options.only)):
            folder = Path(place, str(number))
            folder.mkdir()
            exported = EXPORT if kill.point == "mid-export" else []
            key = " ".join([layout, *exported])
            if key not in whole:
                size, flags = LAYOUTS[layout]
                save = Path(place, key.replace(" ", "_"), "run")
                save.parent.mkdir()
                codes, _ = run_job(size, command(*inputs, save, *flags, *exported), save.parent / "log")
                if any(codes):
                    raise SystemExit((save.parent / "log").read_text()[-3000:])
                whole[key] = result(save)
            save, seconds = one_kill(folder, inputs, layout, more, kill)
            found = result(save)
            unequal = [name for name in whole[key] if found.get(name) != whole[key][name]]
            differing += bool(unequal or found.keys() != whole[key].keys())
            what = f"{kill.point}, occurrence {kill.call}, rank {kill.rank} of {layout} ({' '.join(more)})"
            rest = f"; the other rank ended after {seconds:.1f} s" if LAYOUTS[layout][0] > 1 else ""
            print(
                f"{number + 1:2d}. {what}: {'DIFFERS: ' + str(unequal[:3]) if unequal else 'equal'}{rest}", flush=True
            )
            shutil.rmtree(folder)
    print(f"{differing} of {number + 1} differ", flush=True)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
