"""LoRA on one accelerator: checked against the CPU first, then timed against transformers + peft.

    python benchmarks/gpu_lora.py [--steps 10] [--write]
    python benchmarks/gpu_lora.py --device cpu --layers 2 --hidden 256 --ffn 512 --heads 4 --groups 2 --head 64
        --vocab 1000 --length 256 --sequences 1 --steps 2                          # tries all of the code without one

**This has never been run on an accelerator; only the second command has been run, on a CPU.**

Checks, in processes of their own, on one small model: loss and gradients in fp32 equal those of a CPU in the modular,
the fused and the fused-MLP form; rows packed into one sequence give what separate rows do, in fp32 and in bf16, where
the device's variable-length kernel runs. Then a model of Qwen3-8B's shape with random weights made on the device, bf16,
r 16 on all linear layers, sequences of 2,048 packed tokens. The sides take turns step by step; a step is forward,
backward, clipping and AdamW of `--sequences` micro-batches. Executed FLOPs are those of `training.flops`; the same
number is taken for the peer, whose head also computes tokens without a label.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from pairs import REPO, Worker, append

sys.path.insert(0, str(REPO))

from gpu_sides import PEERS, Job, check, speed  # noqa: E402 (the package lies beside benchmarks/)

TARGET, STRETCH = 10_500, 0.5
PUBLISHED = 8_429
"""Tokens/s of Qwen3-8B LoRA on one H100 that Megatron-Bridge publishes."""
PEAK = 989.0
"""TFLOP/s of an H100 in dense bf16, by its data sheet."""
CLOSE = 1e-5
"""Of each tensor's scale, in fp32."""
BF16_WORSE = 1.5
"""How much further from fp32 packed rows may be in bf16 than separate rows are."""


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two sides' tensors, each over its own scale."""
    found = []
    for name, value in other.items():
        scale = float(value.abs().max()) or 1.0
        found.append(float((one[name] - value).abs().max()) / scale)
    return max(found)


def compare(folder: Path, device: str) -> list[tuple[str, float, float]]:
    """Run the checks; -> (what, how far apart, how far they may be)."""
    import torch

    outcome = {}
    for place in dict.fromkeys(("cpu", device)):
        worker = Worker([__file__, "--serve", "check", place, str(folder)], folder / f"check_{place}.log")
        outcome[place] = torch.load(worker.ask()["file"], weights_only=True)
        worker.close()
    reference, found = outcome["cpu"], outcome[device]
    exact = reference["modular float32 separate"]
    results = [(f"{name} to CPU", apart(found[name], exact), CLOSE) for name in found if "float32" in name]
    for form in ("modular", "fused MLP"):
        rows, packed = (apart(found[f"{form} bfloat16 {how}"], exact) for how in ("separate", "packed"))
        results.append((f"{form} bfloat16 packed, separate rows {rows:.1e}", packed, BF16_WORSE * rows))
    return results


def show_checks(results: Sequence[tuple[str, float, float]]) -> bool:
    """Print the checks; -> whether all hold."""
    for name, found, allowed in results:
        print(f"{'ok  ' if found <= allowed else 'FAIL'} {name}: {found:.1e} (allowed {allowed:.1e})", flush=True)
    return all(found <= allowed for _, found, allowed in results)


def measure(folder: Path, job: Job, device: str, peers: Sequence[str], steps: int) -> dict[str, dict[str, Any]]:
    """Interleaved steps of all sides that fit; -> by side its seconds per step, memory, losses and FLOPs."""
    words = [__file__, "--serve", "speed", device, json.dumps(job.__dict__)]
    workers, found = {}, {}
    for side in ("ours", *peers):
        workers[side] = Worker([*words, side], folder / f"{side}.log")
        found[side] = {"seconds": [], "losses": [], **workers[side].first}
    for turn in range(steps):
        order = list(workers) if turn % 2 == 0 else list(workers)[::-1]
        for side in order:
            answer = workers[side].ask()
            found[side]["seconds"].append(answer["seconds"])
            found[side]["losses"].append(answer["loss"])
            found[side]["peak"] = answer["peak"]
    for worker in workers.values():
        worker.close()
    return found


COLUMNS = "side", "tokens/s", "to ours, pairs", "TFLOP/s", "of the peak", "memory GiB", "loss first, last"
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def table(found: dict[str, dict[str, Any]], job: Job, peak: float) -> str:
    """The figures as a Markdown table, and the targets."""
    tokens, ours, shown = job.length * job.sequences, found["ours"], []
    for side, one in found.items():
        step = statistics.median(one["seconds"])
        teraflops = ours["flops"] / step / 1e12
        ratio = statistics.median(b / a for a, b in zip(ours["seconds"], one["seconds"], strict=True))
        shown.append(
            f"| {side} | {tokens / step:,.0f} | {ratio:.2f}x | {teraflops:.1f} | {teraflops / peak:.0%} | "
            f"{one['peak'] / 2**30:.1f} | {one['losses'][0]:.4f}, {one['losses'][-1]:.4f} |"
        )
    return (
        f"{HEADER}\n" + "\n".join(shown) + f"\n\nTarget: {TARGET:,} tokens/s; stretch: {STRETCH:.0%} of {peak:,.0f} "
        f"TFLOP/s. Megatron-Bridge publishes {PUBLISHED:,} tokens/s for one H100 (Qwen3-8B, LoRA).\n"
    )


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="name of a device; auto: an accelerator, which must be there")
    for name, value in Job().__dict__.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["sdpa"], help="peers, by attention")
    parser.add_argument("--steps", type=int, default=10, help="turns counted")
    parser.add_argument("--peak", type=float, default=PEAK, help="TFLOP/s that shares are of")
    parser.add_argument("--skip-checks", action="store_true", help="time only")
    parser.add_argument("--write", action="store_true", help="append the result to benchmarks/results.md")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Check, time, print; -> exit status: 1 without an accelerator or with a failed check."""
    options = parsed(words)
    if options.serve:
        kind, *rest = options.serve
        {"check": check, "speed": speed}[kind](*rest)
        return 0
    from mindspeed_llm import device

    name = device.detect() if options.device == "auto" else options.device
    if options.device == "auto" and name == "cpu":
        print("gpu_lora.py: no accelerator here; --device cpu with small sizes tries the code", file=sys.stderr)
        return 1
    job = Job(**{key: getattr(options, key) for key in Job().__dict__})
    with tempfile.TemporaryDirectory() as folder:
        if not options.skip_checks and not show_checks(compare(Path(folder), name)):
            return 1
        found = measure(Path(folder), job, name, options.peers, options.steps)
    text = (
        f"## LoRA on one accelerator: {job.layers} layers x {job.hidden}, {job.sequences} x {job.length} tokens, "
        f"{job.rows} rows packed into each sequence\n\n"
        f"{date.today()}; {found['ours']['machine']}; {job.dtype}, {options.steps} interleaved steps, medians\n\n"
        + table(found, job, options.peak)
    )
    print(text)
    if options.write:
        append(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
