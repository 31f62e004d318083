"""CCLoRA against our own modular LoRA on a slow link: TP2, and TP2 with sequence parallelism.

    python benchmarks/cc_lora.py [--layout tp sp] [--share 0 0.2 0.35 0.5] [--dtype float32 bfloat16] [--pairs 7]
        [--clock wall] [--chunk-kib N]

Two processes with one thread each train the same model. The link is emulated above gloo by a process group whose Work
ends `latency + bytes / bandwidth` after it was issued, or after the message before it on the same link, if that ends
later. Bandwidth is set so that communication takes the asked-for share c of the modular form's step:

    c = 1 - T(modular, no emulation) / T(modular, emulated)

Steps are interleaved (modular, fused, fused MLP, modular, ...); printed is the median of the ratios of each round, with
the target 1 / (1 - 0.6 c), and for c = 0 (no emulation) 0.97. Every form starts from the same weights and sees the same
rows; the losses of their first steps are printed.

`--clock cpu` measures on a busy machine: a step's time is its thread's processor time plus the time it would have
waited for the link. Both ranks are then taken to be equally fast, and gloo's own work to cost nothing.
"""

import argparse
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

LATENCY = 100e-6
SIZES = {"layers": 4, "hidden": 1024, "ffn": 3072, "heads": 16, "groups": 8, "head": 64, "vocab": 2048}
ROWS, LENGTH, RANK, ALPHA = 2, 512, 16, 32
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
FORMS = ("modular", "fused", "fused MLP")
Step = Callable[[], float]


class Clock:
    """Time as the benchmark sees it: the wall's, or this thread's work plus what it would have waited for the link."""

    def __init__(self, wall: bool) -> None:
        self.wall, self.waited = wall, 0.0

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter() if self.wall else time.thread_time() + self.waited

    def wait_until(self, due: float) -> None:
        """Let time pass."""
        left = max(0.0, due - self.now())
        if self.wall:
            time.sleep(left)
        else:
            self.waited += left


class Link:
    """A slow link: messages follow one another at a bandwidth, and each arrives a latency later.

    Attributes:
        seconds_per_byte: 0 turns the emulation off.
        sent: bytes so far.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds_per_byte = 0.0
        self.free = 0.0
        self.sent = 0

    def send(self, nbytes: int) -> float:
        """Issue a message now; -> when it has arrived."""
        self.sent += nbytes
        if not self.seconds_per_byte:
            return 0.0
        self.free = max(self.free, self.clock.now()) + nbytes * self.seconds_per_byte
        return self.free + LATENCY


def slow_backend(link: Link) -> Any:
    """A process group class over gloo whose works end when `link` says so."""
    import torch
    from torch.distributed import ProcessGroup, ProcessGroupGloo, Work

    class SlowWork(Work):
        def __init__(self, inner: Any, due: float) -> None:
            super().__init__()
            self.inner, self.due = inner, due

        def wait(self, timeout: Any = None) -> bool:
            self.inner.wait()
            link.clock.wait_until(self.due)
            return True

        def is_completed(self) -> bool:
            return self.inner.is_completed() and link.clock.now() >= self.due

    class SlowGroup(ProcessGroup):
        """gloo with a delay; a group of one process has no link."""

        def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
            super().__init__(rank, size)
            self.inner = ProcessGroupGloo(store, rank, size, timeout)

        def slow(self, work: Any, nbytes: float) -> Any:
            return SlowWork(work, link.send(int(nbytes)) if self.size() > 1 else 0.0)

        def allreduce(self, tensors: Any, options: Any = None) -> Any:
            options = options or torch.distributed.AllreduceOptions()
            share = 2 * (self.size() - 1) / self.size()  # of a ring
            return self.slow(self.inner.allreduce(tensors, options), share * sum(t.nbytes for t in tensors))

        def _allgather_base(self, out: Any, x: Any, options: Any = None) -> Any:
            options = options or torch.distributed.AllgatherOptions()
            return self.slow(self.inner._allgather_base(out, x, options), out.nbytes - x.nbytes)

        def _reduce_scatter_base(self, out: Any, x: Any, options: Any = None) -> Any:
            options = options or torch.distributed.ReduceScatterOptions()
            return self.slow(self.inner._reduce_scatter_base(out, x, options), x.nbytes - out.nbytes)

        # torch 2.13 calls these by other names than its predecessors
        all_gather_single = _allgather_base
        reduce_scatter_single = _reduce_scatter_base

        def allreduce_coalesced(self, tensors: Any, options: Any = None) -> Any:
            options = options or torch.distributed.AllreduceCoalescedOptions()
            return self.inner.allreduce_coalesced(tensors, options)

        def allgather(self, outs: Any, xs: Any, options: Any = None) -> Any:
            return self.inner.allgather(outs, xs, options or torch.distributed.AllgatherOptions())

        def broadcast(self, tensors: Any, options: Any = None) -> Any:
            return self.inner.broadcast(tensors, options or torch.distributed.BroadcastOptions())

        def barrier(self, opts: Any = None) -> Any:
            return self.inner.barrier(opts or torch.distributed.BarrierOptions())

        def getBackendName(self) -> str:  # noqa: N802 (torch's name)
            return "slow"

    return lambda store, rank, size, timeout: SlowGroup(store, rank, size, timeout)


def model() -> Any:
    """The benchmark's Qwen3-like dimensions."""
    from transformers import Qwen3Config

    from mindspeed_llm.models.config import ModelConfig

    size = SIZES
    config = Qwen3Config(
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        intermediate_size=size["ffn"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["groups"],
        head_dim=size["head"],
        max_position_embeddings=4096,
        architectures=["Qwen3ForCausalLM"],
    )
    return ModelConfig.from_hf_dict(config.to_dict(), "benchmark")


def build(form: str, sequence_parallel: bool, dtype: str, chunk_bytes: int | None) -> Step:
    """One form's training step on this rank."""
    import torch

    from mindspeed_llm import device
    from mindspeed_llm.arguments.optimizer import OptimizerOptions
    from mindspeed_llm.checkpoint.metadata import LoraSettings
    from mindspeed_llm.lora.inject import inject
    from mindspeed_llm.lora.layers import lora_layers
    from mindspeed_llm.models.gpt import DTYPES, EngineOptions, build_chunks
    from mindspeed_llm.training.engine import create_engine, train_step

    options = EngineOptions(tensor=2, sequence_parallel=sequence_parallel, dtype=DTYPES[dtype])
    chunks = build_chunks(model(), options, device.select("cpu"))
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    with torch.no_grad():
        for name, parameter in chunks[0].named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02, generator=generator)
    inject(chunks, LoraSettings(RANK, ALPHA, tuple(TARGETS)), form != "modular", 1, form == "fused MLP")
    for layer in lora_layers(chunks[0]) if chunk_bytes else ():
        layer.chunk_bytes = chunk_bytes
    engine = create_engine(chunks, OptimizerOptions(lr=1e-4, weight_decay=0.0))
    tokens = torch.randint(0, SIZES["vocab"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([tokens[:, 1:], torch.full((ROWS, 1), -100)], dim=1)
    return lambda: train_step(engine, [{"tokens": tokens, "labels": labels}]).loss


@dataclass
class Timings:
    """Seconds of every step by form, and the last losses."""

    seconds: dict[str, list[float]]
    losses: dict[str, float]
    sent: dict[str, int]

    def ratios(self, form: str) -> list[float]:
        """Modular over `form`, round by round."""
        return [a / b for a, b in zip(self.seconds["modular"], self.seconds[form], strict=True)]


def rounds(steps: dict[str, Step], link: Link, number: int, first: int = 0) -> Timings:
    """`number` interleaved rounds, every other one backwards; a step ends when the slower rank has."""
    import torch

    timings = Timings({form: [] for form in steps}, {}, {})
    for index in range(first, first + number):
        forms = list(steps) if index % 2 == 0 else list(steps)[::-1]
        for form in forms:
            torch.distributed.barrier()
            sent, began = link.sent, link.clock.now()
            timings.losses[form] = steps[form]()
            torch.distributed.barrier()
            timings.seconds[form].append(link.clock.now() - began)
            timings.sent[form] = link.sent - sent
    return timings


def calibrate(steps: dict[str, Step], link: Link, share: float, pairs: int) -> None:
    """Set the link's speed so that communication takes `share` of the modular step; the same on both ranks."""
    import torch

    link.seconds_per_byte = 0.0
    only = {"modular": steps["modular"]}
    base = rounds(only, link, max(3, pairs // 2))
    compute = statistics.median(base.seconds["modular"])
    wanted = compute * share / (1 - share)
    speed = torch.tensor([wanted / base.sent["modular"]], dtype=torch.float64)
    torch.distributed.broadcast(speed, 0)
    link.seconds_per_byte = float(speed)


def report(
    layout: str, dtype: str, share: float, link: Link, timings: Timings, quick: float, losses: dict[str, float]
) -> None:
    """Print one line per fused form."""
    emulated = statistics.median(timings.seconds["modular"])
    found = max(0.0, 1 - quick / emulated) if share else 0.0
    target = 1 / (1 - 0.6 * found) if share else 0.97
    link_said = f"{1 / link.seconds_per_byte / 1e6:.0f} MB/s" if link.seconds_per_byte else "no emulation"
    for form in FORMS[1:]:
        ratios = sorted(timings.ratios(form))
        best = statistics.median(ratios)
        print(
            f"| {layout} | {dtype} | {found:.2f} | {link_said} | {form} | {emulated:.3f} | "
            f"{statistics.median(timings.seconds[form]):.3f} | {best:.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f}) | "
            f"{target:.3f} | {'met' if best >= target else 'missed'} | "
            f"{losses['modular']:.5f} / {losses[form]:.5f} |",
            flush=True,
        )


def serve(rank: int, port: int, arguments: argparse.Namespace) -> None:
    """One rank: every layout, dtype and share in turn."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch

    from mindspeed_llm import device

    torch.set_num_threads(1)
    chosen = device.select("cpu")
    from mindspeed_llm.models import parallel

    link = Link(Clock(arguments.clock == "wall"))
    torch.distributed.Backend.register_backend("slow", slow_backend(link), devices=["cpu"])
    torch.distributed.init_process_group("slow")
    parallel.start(chosen, 2)
    for layout in arguments.layout:
        for dtype in arguments.dtype:
            chunk = arguments.chunk_kib * 1024 if arguments.chunk_kib else None
            steps = {form: build(form, layout == "sp", dtype, chunk) for form in FORMS}
            losses = rounds(steps, link, 1).losses  # of equal weights; it warms up, too
            for share in arguments.share:
                calibrate(steps, link, share, arguments.pairs)
                report_ = measured(share, link, steps, arguments.pairs)
                if rank == 0:
                    report(layout, dtype, share, link, *report_, losses)
            del steps


def measured(share: float, link: Link, steps: dict[str, Step], pairs: int) -> tuple[Timings, float]:
    """(interleaved rounds, median of the modular form's steps without emulation, taken between them)."""
    speed, quick = link.seconds_per_byte, []
    timings = Timings({form: [] for form in steps}, {}, {})
    for index in range(pairs):
        link.seconds_per_byte = 0.0
        quick += rounds({"modular": steps["modular"]}, link, 1).seconds["modular"] if share else [0.0]
        link.seconds_per_byte = speed
        part = rounds(steps, link, 1, index)
        for form in steps:
            timings.seconds[form] += part.seconds[form]
    return timings, statistics.median(quick)


def main(words: Sequence[str] | None = None) -> None:
    """Start both ranks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", nargs="+", choices=("tp", "sp"), default=["tp", "sp"])
    parser.add_argument("--share", nargs="+", type=float, default=[0.0, 0.2, 0.35, 0.5])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine that is not idle")
    parser.add_argument("--chunk-kib", type=int, default=0, help="least size of a chunk; 0: the package's own")
    arguments = parser.parse_args(words)
    os.environ["OMP_NUM_THREADS"] = "1"
    import multiprocessing

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, latency {LATENCY:g} s"
    )
    print("| layout | dtype | c | link | form | modular s | form s | speed-up (range) | target | | losses |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=serve, args=(rank, port, arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


if __name__ == "__main__":
    main()
