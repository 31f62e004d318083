"""A LoRA training step: ours against transformers + peft, on the same HF folder and tokens.

    python benchmarks/train_step.py [--dtype fp32 bf16] [--steps 12] [--write]

Each engine lives in a process of its own; the steps are interleaved (ours, peer, ours, peer, ...), so a machine that
drifts slows both. A step is forward, backward, clipping and AdamW over all adapters. Printed: the median step of
each, the ratio pair by pair, peak resident memory, and the share of the limit:

    limit = FLOPs of the frozen base's products, forward and gradient of the input (4 x weights x tokens)
            / the best rate in a sweep of those products' own shapes in the same run.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from pairs import DTYPES as NAMES
from pairs import READY, REPO, Worker, append, channel, machine

sys.path.insert(0, str(REPO))

LAYERS, HIDDEN, FFN, HEADS, GROUPS, HEAD, VOCAB = 8, 1024, 3072, 16, 8, 64, 32000
ROWS, LENGTH, RANK, ALPHA = 2, 512, 16, 32
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
PEER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# (outputs, inputs) of one layer's products; the peer splits qkv and gate/up into single ones
PRODUCTS = [((HEADS + 2 * GROUPS) * HEAD, HIDDEN), (HIDDEN, HEADS * HEAD), (2 * FFN, HIDDEN), (HIDDEN, FFN)]
Step = Callable[[], float]


def weights() -> int:
    """Elements of all frozen weights that take part in products."""
    return LAYERS * sum(out * into for out, into in PRODUCTS) + VOCAB * HIDDEN


def make_model(folder: Path) -> None:
    """A Qwen3 folder of the benchmark's size with seeded random weights, fp32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def batch() -> tuple[Any, Any]:
    """Tokens and shifted labels [ROWS, LENGTH], every position trained but the last."""
    import torch

    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([tokens[:, 1:], torch.full((ROWS, 1), -100)], dim=1)
    return tokens, labels


def our_step(folder: str, dtype: str) -> Step:
    """One `train_step` of our engine, megatron-core underneath."""
    from mindspeed_llm import device

    chosen = device.select("cpu")
    from mindspeed_llm.arguments.optimizer import OptimizerOptions
    from mindspeed_llm.checkpoint.live import load_live
    from mindspeed_llm.checkpoint.metadata import LoraSettings
    from mindspeed_llm.checkpoint.open import open_base
    from mindspeed_llm.lora.inject import inject
    from mindspeed_llm.models import parallel
    from mindspeed_llm.models.gpt import DTYPES, EngineOptions, build_chunks
    from mindspeed_llm.training.engine import create_engine, train_step

    source = open_base(folder)
    parallel.start(chosen)
    chunks = build_chunks(source.config, EngineOptions(dtype=DTYPES[dtype]), chosen)
    load_live(dict(chunks[0].named_parameters()), source)
    inject(chunks, LoraSettings(RANK, ALPHA, tuple(TARGETS)), fused=True, seed=1, fused_mlp=True)
    engine = create_engine(chunks, OptimizerOptions(lr=1e-4, weight_decay=0.0))
    tokens, labels = batch()
    return lambda: train_step(engine, [{"tokens": tokens, "labels": labels}]).loss


def peer_step(folder: str, dtype: str) -> Step:
    """The same step in transformers + peft: SDPA attention, adapters in the model's dtype (faster than peft's fp32)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3ForCausalLM

    base = Qwen3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PEER_TARGETS, lora_dropout=0.0)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    tokens, _ = batch()
    model.train()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss)

    return step


def best_rate(dtype: str, repeats: int = 5) -> dict[str, float]:
    """FLOP/s of each base product of the step, forward and input gradient, best of `repeats`."""
    import torch

    kind = getattr(torch, dtype)
    rates = {}
    for out, into in [*PRODUCTS, (VOCAB, HIDDEN)]:
        weight = torch.randn(out, into).to(kind)
        for name, left, right in (
            ("forward", torch.randn(ROWS * LENGTH, into).to(kind), weight.t()),
            ("gradient", torch.randn(ROWS * LENGTH, out).to(kind), weight),
        ):
            times = []
            for _ in range(repeats):
                began = time.perf_counter()
                torch.mm(left, right)
                times.append(time.perf_counter() - began)
            rates[f"{name} {out}x{into}"] = 2 * ROWS * LENGTH * out * into / min(times)
    return rates


def serve(engine: str, folder: str, dtype: str) -> None:
    """A worker: answer every request with one step's seconds and loss, or with the rates of products."""
    requests, answer = channel()
    step = {"ours": our_step, "peer": peer_step}[engine](folder, dtype)
    step()
    answer(READY)
    for request in requests:
        if request == "rate":
            answer(best_rate(dtype))
            continue
        began = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer({"seconds": seconds, "loss": loss, "peak": peak})


def compare(folder: str, dtype: str, steps: int) -> dict[str, Any]:
    """Interleaved steps of both engines; -> the figures of one row."""
    ours, peer = (
        Worker([__file__, "--serve", engine, folder, dtype], Path(folder) / f"{engine}_{dtype}.log")
        for engine in ("ours", "peer")
    )
    pairs = [(ours.ask(), peer.ask()) for _ in range(steps)]
    rates = ours.ask("rate")  # after the steps, whose memory it would add to
    for name, rate in peer.ask("rate").items():
        rates[name] = max(rate, rates[name])
    ours.close()
    peer.close()
    mine, other = ([pair[side]["seconds"] for pair in pairs] for side in (0, 1))
    limit = 4 * weights() * ROWS * LENGTH / max(rates.values())
    return {
        "dtype": dtype,
        "ours": statistics.median(mine),
        "peer": statistics.median(other),
        "ratio": statistics.median(b / a for a, b in zip(mine, other, strict=True)),
        "limit": limit,
        "share": limit / statistics.median(mine),
        "share_best": limit / min(mine),
        "rate": max(rates.values()),
        "memory": (pairs[-1][0]["peak"], pairs[-1][1]["peak"]),
        "losses": (pairs[-1][0]["loss"], pairs[-1][1]["loss"]),
        "first_losses": (pairs[0][0]["loss"], pairs[0][1]["loss"]),
    }


def show(row: dict[str, Any]) -> str:
    """One result as a line of a Markdown table."""
    ours, peer = (value / 2**30 for value in row["memory"])
    return (
        f"| {row['dtype']} | {row['ours']:.2f} | {row['peer']:.2f} | {row['ratio']:.2f}x | {row['limit']:.2f} | "
        f"{row['rate'] / 1e9:,.0f} | {row['share']:.0%} | {ours:.2f} / {peer:.2f} |"
    )


COLUMNS = "dtype", "ours s", "peer s", "peer / ours", "limit s", "GFLOP/s", "share of the limit", "RSS GiB, ours / peer"
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--steps", type=int, default=12, help="pairs of steps counted")
    parser.add_argument("--write", action="store_true", help="append the result to benchmarks/results.md")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        rows = [compare(folder, NAMES[dtype], options.steps) for dtype in options.dtype]
    title = f"## LoRA step: {LAYERS} layers x {HIDDEN}, vocabulary {VOCAB}, {ROWS} x {LENGTH} tokens, r {RANK}"
    text = f"{title}\n\n{date.today()}; {machine()}; {options.steps} interleaved pairs, medians\n\n{HEADER}\n"
    text += "\n".join(show(row) for row in rows) + "\n"
    print(text)
    for row in rows:
        print(f"{row['dtype']}: losses ours / peer {row['first_losses']} -> {row['losses']}")
    if options.write:
        append(text)


if __name__ == "__main__":
    main()
