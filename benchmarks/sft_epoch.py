"""A whole epoch of LoRA fine-tuning, wall time and loss: ours, peft + Trainer (default, best), TRL with packing.

    python benchmarks/sft_epoch.py [--dtype fp32 bf16] [--rows 256] [--steps 4] [--clock wall] [--write]

The model of `train_step.py`, and rows with the lengths of Alpaca: one to two sentences of instruction, with 0.4
probability up to three of input, one to twelve of answer, from a pool of twenty. All sides read the same folder and
rows, train 8 rows per optimizer step (TRL: packs of as many tokens) with the same learning rates and per-token loss,
and save at the end; loading is not timed. They take turns of `--steps` steps. On a machine that is not
idle, `--clock cpu` counts each process's own processor time, with one thread: two would burn it waiting for each other.

| side | what |
|---|---|
| ours | posttrain_gpt.py's loop: --padding-free --lora-fusion --use-fused-mlp |
| default | peft + Trainer: random order, batches padded to their longest row, float32 adapters |
| best | the same with rows of like length, adapters in the model's type, SDPA |
| trl | SFTTrainer, best-fit packing, SDPA with a mask between rows; "speed only" where rows see each other |
"""

import argparse
import os
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from pairs import DTYPES, REPO, RESULTS, THREADS, Worker, append, machine

sys.path.insert(0, str(REPO))

from sft_sides import BATCH, HELD_OUT, PACKED_TRL, TRAIN, serve  # noqa: E402 (the package lies beside benchmarks/)
from train_step import HIDDEN, LAYERS, VOCAB, make_model  # noqa: E402

SIDES = ("ours", "default", "best", PACKED_TRL)
SENTENCES = (12, 13, 11, 9, 20, 20, 21, 32, 10, 17, 14, 18, 22, 12, 16, 25, 11, 19, 15, 13)
"""Tokens of the pool's sentences."""
BEGIN, ANSWER, END, LEAST = (3, 4, 5), (6, 7, 8), (1,), 100
"""Tokens around prompt and answer, and the least that sentences have."""
HELD_OUT_ROWS = 32
TARGETS = {"bfloat16": {"default": 2.5, "best": 1.5}, "float32": {"default": 1.8, "best": 1.2}}
SAME = 0.02
"""Relative difference of final losses that counts as none: orders of rows and draws of A differ."""


def make_rows(number: int, seed: int) -> list[tuple[list[int], int]]:
    """(tokens, how many of them are the prompt) of each row."""
    pool_of = np.random.default_rng(0)
    pool = [pool_of.integers(LEAST, VOCAB, length).tolist() for length in SENTENCES]
    random = np.random.default_rng(seed)

    def sentences(count: int) -> list[int]:
        return [token for choice in random.integers(0, len(pool), count) for token in pool[choice]]

    rows = []
    for _ in range(number):
        prompt = [*BEGIN, *sentences(random.integers(1, 3))]
        prompt += sentences(random.integers(1, 4)) if random.random() < 0.4 else []
        prompt += ANSWER
        rows.append((prompt + sentences(random.integers(1, 13)) + list(END), len(prompt)))
    return rows


def write_rows(rows: list[tuple[list[int], int]], prefix: Path) -> None:
    """The files that preprocess_data.py makes of such rows."""
    from mindspeed_llm.data.indexed_file import IndexedFileWriter

    fields = {
        "input_ids": lambda tokens, prompt: tokens,
        "labels": lambda tokens, prompt: [-100] * prompt + tokens[prompt:],
        "attention_mask": lambda tokens, prompt: [1] * len(tokens),
    }
    for name, values in fields.items():
        with IndexedFileWriter(Path(f"{prefix}_packed_{name}_document")) as writer:
            for tokens, prompt in rows:
                writer.add(np.array(values(tokens, prompt), np.int32), [len(tokens)])


def run(folder: Path, dtype: str, steps: int, clock: str) -> dict[str, dict[str, Any]]:
    """One epoch of every side in turns; -> by side its seconds in all and per slice, losses and peak memory."""
    words = [__file__, "--serve", str(folder), dtype, clock]
    threads = THREADS if clock == "wall" else 1
    workers = {side: Worker([*words, side], folder / f"{side}.log", threads) for side in SIDES}
    found: dict[str, dict[str, Any]] = {side: {"slices": []} for side in SIDES}
    turn, waiting = 0, list(SIDES)
    while waiting:
        for side in waiting if turn % 2 == 0 else waiting[::-1]:
            answer = workers[side].ask(steps)
            found[side]["slices"].append((answer["seconds"], answer["steps"]))
            if "end" in answer:
                found[side] |= answer["end"] | {"peak": answer["peak"]}
                workers[side].close()
        waiting = [side for side in waiting if "peak" not in found[side]]
        turn += 1
    for side in SIDES:
        found[side]["seconds"] = sum(seconds for seconds, _ in found[side]["slices"])
        found[side]["steps"] = sum(number for _, number in found[side]["slices"])
    return found


FIGURE = Path("figures") / "sft_epoch.png"
"""Where curves go, beside results.md; the type stands in the name."""


def figure_of(base: Path, dtype: str) -> Path:
    """The figure of a type, as options name it."""
    return base.with_stem(f"{base.stem}_{dtype}")


def draw(dtype: str, sides: dict[str, dict[str, Any]], path: Path) -> None:
    """A type's losses over steps and over wall time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(11, 4))
    for side, one in sides.items():
        losses = one["losses"]
        times = np.cumsum([seconds / number for seconds, number in one["slices"] for _ in range(number)])
        by_step.plot(range(1, len(losses) + 1), losses, label=side)
        by_time.plot(times[: len(losses)], losses, label=f"{side}: {one['seconds']:.0f} s")
    by_step.set(title=f"{dtype}: one epoch", xlabel=f"step of {BATCH} rows", ylabel="training loss")
    by_time.set(title=f"{dtype}: the same over time", xlabel="seconds", ylabel="training loss")
    for axes in (by_step, by_time):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True, parents=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


COLUMNS = "dtype", "side", "epoch s", "side / ours", "slices", "target", "steps", "held-out loss", "to ours", "RSS GiB"
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def lines(dtype: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """A dtype's lines of the Markdown table."""
    ours, shown = found["ours"], []
    for side, one in found.items():
        ratio = one["seconds"] / ours["seconds"]
        pairs = [
            (theirs[0] / theirs[1]) / (own[0] / own[1])
            for theirs, own in zip(one["slices"], ours["slices"], strict=False)
        ]
        target = TARGETS[dtype].get(side)
        said = "" if target is None else f"{target}x {'met' if ratio >= target else 'missed'}"
        if one.get("mixed"):
            said = "speed only: rows see each other"
        apart = one["held_out"] / ours["held_out"] - 1
        equal = "" if side == "ours" else f"{apart:+.2%} {'same' if abs(apart) <= SAME else 'NOT THE SAME'}"
        shown.append(
            f"| {dtype} | {side} | {one['seconds']:.1f} | {ratio:.2f}x | {statistics.median(pairs):.2f}x | {said} | "
            f"{one['steps']} | {one['held_out']:.4f} | {equal} | {one['peak'] / 2**30:.2f} |"
        )
    return shown


def main() -> None:
    """Run the comparison, print the table and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=list(DTYPES))
    parser.add_argument("--rows", type=int, default=256, help="rows of the epoch")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a turn")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine that is not idle")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results.md")
    parser.add_argument(
        "--figure", type=Path,
        help="where the curves go, one picture per type with its name in it; left out, sft_epoch.png in "
        "benchmarks/figures with --write, else in a temporary place",
    )  # fmt: skip
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        where, dtype, clock, side = options.serve
        serve(side, Path(where), dtype, clock)
        return
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        rows = make_rows(options.rows, seed=1)
        write_rows(rows, folder / TRAIN)
        write_rows(make_rows(HELD_OUT_ROWS, seed=2), folder / HELD_OUT)
        for dtype in options.dtype:
            found[DTYPES[dtype]] = run(folder, DTYPES[dtype], options.steps, options.clock)
    lengths = [len(tokens) for tokens, _ in rows]
    text = (
        f"## One epoch: {LAYERS} layers x {HIDDEN}, vocabulary {VOCAB}, {options.rows} rows of {min(lengths)} to "
        f"{max(lengths)} tokens ({statistics.mean(lengths):.0f} on average)\n\n"
        f"{date.today()}; {machine()}; turns of {options.steps} steps; {options.clock} clock; slices: median ratio "
        f"of turns\n\n{HEADER}\n"
    )
    text += "\n".join(line for dtype, sides in found.items() for line in lines(dtype, sides)) + "\n"
    print(text)
    base = options.figure or (RESULTS.parent / FIGURE if options.write else Path(tempfile.gettempdir()) / FIGURE.name)
    for short in options.dtype:
        picture = figure_of(base, short)
        draw(DTYPES[short], found[DTYPES[short]], picture)
        print(f"curves: {picture}")
        link = Path(os.path.relpath(picture.resolve(), RESULTS.parent)).as_posix()
        text += f"\n![{DTYPES[short]}: loss of every side]({link})\n"
    if options.write:
        append(text)


if __name__ == "__main__":
    main()
