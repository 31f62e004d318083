"""Plans and peaks as text."""

import shlex
from collections.abc import Sequence

from mindspeed_llm.planning.estimate import Estimate
from mindspeed_llm.planning.memory import Memory
from mindspeed_llm.planning.propose import Wish, flags

GIB = 2**30
COLUMNS = ("weights", "adapters", "gradients", "optimizer", "activations", "communication", "total")
SHORT = ("weights", "adapt", "grads", "optim", "activ", "comm", "total")


def memory_line(need: Memory) -> str:
    """The classes of a prediction in GiB: "weights 1.20, optimizer 0.30 ..."; empty ones are left out."""
    shown = [f"{name} {value / GIB:.2f}" for name, value in need.by_class().items() if value]
    return ", ".join(shown) + " GiB"


def layout_name(one: Estimate) -> str:
    """ "TP2 PP4 VPP2 DP4 EP8, 2 rows, recompute"."""
    job = one.job
    sizes = [str(job.layout)]
    sizes += [f"CP{job.context}"] if job.context > 1 else []
    sizes += [f"DP{job.replicas}"] if job.replicas > 1 else []
    rows = job.micro_batch // 2 if job.pairs else job.micro_batch
    return f"{' '.join(sizes)}, {rows} x {job.micro_batches}{', recompute' if job.recompute else ''}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with the first cell flush left and the others right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def table(wish: Wish, found: Sequence[Estimate], most: int) -> str:
    """The proposals: memory of the fullest rank by class, messages, time; then the options of the best."""
    fit = sum(one.memory.total <= wish.usable for one in found)
    tuned = "full tuning" if wish.settings is None else f"LoRA r {wish.settings.r}"
    tuned, noun = (f"DPO, {tuned}", "pairs") if wish.pairs else (tuned, "rows")
    card = wish.card
    lines = [
        f"{tuned} of a {wish.model.family} model of {wish.model.num_layers} layers, {wish.dtype}, on {wish.cards} x "
        f"{card.name}, {card.memory / GIB:.0f} GiB each, of which tensors may take {wish.usable / GIB:.1f}",
        f"{noun}: {wish.lengths.origin}; {wish.rows} {noun} a step",
        f"rates: {card.tflops:.4g} TFLOP/s x {card.reached:.2f}, links {card.link * 8 / 1e9:.0f} Gbit/s, between nodes "
        f"{card.network * 8 / 1e9:.0f} ({card.origin})",
        f"{len(found)} layouts, {fit} of them fit; memory in GiB of the fullest rank; predicted, see docs/plan.md",
        "",
    ]
    head = (f"layout, {noun} x micro-batches", *SHORT, "GB sent", "s/step", "tokens/s/card")
    rows: list[Sequence[str]] = [head]
    for one in found[:most]:
        sizes = [f"{getattr(one.memory, name) / GIB:.2f}" for name in COLUMNS]
        misses = "" if one.memory.total <= wish.usable else " (too large)"
        times = (f"{one.sent / 1e9:.2f}", f"{one.seconds:.3g}", f"{one.rate:.4g}")
        rows.append((layout_name(one) + misses, *sizes, *times))
    lines += columns(rows)
    best = found[0]
    if fit:
        lines += ["", "options of the first:", "  " + shlex.join(flags(best.job))]
    else:
        lack = (best.memory.total - wish.usable) / GIB
        lines += [
            "",
            f"none fits: the smallest needs {lack:.1f} GiB more a card; use more cards or a shorter --seq-length",
        ]
    return "\n".join(lines)


def peaks(places: Sequence[str], predicted: Sequence[Memory], measured: Sequence[dict[str, int]]) -> str:
    """Predicted and measured peaks of every rank by class, in MiB."""
    rows: list[Sequence[str]] = [("live tensors, MiB: predicted / measured", *SHORT)]
    for place, need, seen in zip(places, predicted, measured, strict=True):
        cells = [f"{getattr(need, name) / 2**20:.1f} / {seen[name] / 2**20:.1f}" for name in COLUMNS]
        rows.append((place, *cells))
    return "\n".join(columns(rows))
