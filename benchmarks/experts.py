"""A LoRA step of a tiny model with experts: computed together (`--moe-grouped-gemm`) against one after another.

    python benchmarks/experts.py [--experts 8 64] [--dtype fp32 bf16] [--steps 10]

Both engines live in one process, on the same weights and tokens; their steps are interleaved. Printed for each: tokens
per second of the median step, the least CPU time of a step, and the median of the ratios pair by pair.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from pairs import DTYPES, REPO

sys.path.insert(0, str(REPO))

LAYERS, HIDDEN, WIDTH, HEADS, GROUPS, HEAD, VOCAB, CHOSEN = 4, 256, 128, 8, 4, 32, 1024, 4
ROWS, LENGTH, RANK, ALPHA = 4, 256, 16, 32
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
Step = Callable[[], float]


def make_model(folder: str, experts: int) -> None:
    """A Qwen3-MoE folder with seeded random weights, fp32."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD,
        num_experts=experts,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        max_position_embeddings=1024,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def make_step(folder: str, dtype: str, grouped: bool, fused: bool, chosen: Any) -> Step:
    """One `train_step` of an engine on the weights of `folder`."""
    import torch

    from mindspeed_llm.arguments.optimizer import OptimizerOptions
    from mindspeed_llm.checkpoint.layout import ExpertShare
    from mindspeed_llm.checkpoint.live import live_tensors, load_live
    from mindspeed_llm.checkpoint.metadata import LoraSettings
    from mindspeed_llm.checkpoint.open import open_base
    from mindspeed_llm.lora.inject import inject
    from mindspeed_llm.models import gpt, parallel
    from mindspeed_llm.training.engine import create_engine, train_step

    source = open_base(folder)
    if not torch.distributed.is_initialized():
        parallel.start(chosen)
    options = gpt.EngineOptions(dtype=gpt.DTYPES[dtype], grouped_experts=grouped)
    chunks = gpt.build_chunks(source.config, options, chosen)
    share = ExpertShare(*parallel.expert_place(source.config.num_experts))
    load_live(live_tensors(chunks[0]), source, experts=share)
    inject(chunks, LoraSettings(RANK, ALPHA, TARGETS), fused=fused, seed=1)
    engine = create_engine(chunks, OptimizerOptions(lr=1e-4, weight_decay=0.0))
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([tokens[:, 1:], torch.full((ROWS, 1), -100)], dim=1)
    return lambda: train_step(engine, [{"tokens": tokens, "labels": labels}]).loss


def timed(step: Step) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, loss) of a step."""
    wall, used = time.perf_counter(), time.process_time()
    loss = step()
    return time.perf_counter() - wall, time.process_time() - used, loss


def compare(folder: str, dtype: str, fused: bool, steps: int, chosen: Any) -> str:
    """Interleaved steps of both forms; -> the figures of one row."""
    forms = [make_step(folder, DTYPES[dtype], grouped, fused, chosen) for grouped in (False, True)]
    first = [timed(step)[2] for step in forms]
    pairs = [[timed(step)[:2] for step in forms] for _ in range(steps)]
    walls, used = ([[pair[form][kind] for pair in pairs] for form in (0, 1)] for kind in (0, 1))
    ratio = statistics.median(one / together for one, together in zip(*walls, strict=True))
    rates = [ROWS * LENGTH / statistics.median(each) for each in walls]
    cpu = [1e3 * min(each) for each in used]
    return (
        f"{rates[0]:,.0f} | {rates[1]:,.0f} | {ratio:.2f} | {cpu[0]:.0f} | {cpu[1]:.0f} | "
        f"{abs(first[0] - first[1]) / first[0]:.0e}"
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    from mindspeed_llm import device

    chosen = device.select("cpu")
    print("| experts | dtype | adapters | tokens/s apart | together | ratio | CPU ms apart | together | losses by |")
    print("|---|---|---|---|---|---|---|---|---|")
    for experts in given.experts:
        with tempfile.TemporaryDirectory() as folder:
            make_model(folder, experts)
            for dtype in given.dtype:
                for fused in (False, True):
                    form = "CCLoRA" if fused else "modular"
                    found = compare(folder, dtype, fused, given.steps, chosen)
                    print(f"| {experts} | {dtype} | {form} | {found} |", flush=True)


if __name__ == "__main__":
    main()
