"""Converting a checkpoint against copying the same bytes: the disk is the limit, so the copy is the yardstick.

    python benchmarks/convert.py [--rounds 5] [--given HF_FOLDER] [--work FOLDER] [--write]
    python benchmarks/convert.py --scale 22 [--work FOLDER] [--write]

The model has Qwen3-0.6B's shapes in bf16, 1.2 GB. Each round converts hf -> mg and mg -> hf at TP1 PP1 and TP2 PP2,
each in a process of its own, and copies the HF file with `cp` and `sync`; the rounds are interleaved, the first one is
discarded, the best of the others counts. Conversion and copy both end when the bytes are on the disk. Printed: seconds
from the end of the imports to the end, the copy's, their ratio, seconds from the start of the process to the first byte
written, and the peak of resident memory, mapped pages included.

    goal = 1.5 x copy + 1.5 s, first byte within 3 s, 600 MiB

`--scale` converts a generated mixture of experts of about so many GB, once, hf -> mg TP2 PP2 EP2, and prints memory.
The source is a file with holes; the result is written in full.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results.md"
TITLE = "## Conversion"
LAYERS, HIDDEN, FFN, HEADS, GROUPS, HEAD, VOCAB = 28, 1024, 3072, 16, 8, 128, 151936
BASE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "vocab_size": VOCAB,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
}
DENSE = {"architectures": ["Qwen3ForCausalLM"], **BASE, "tie_word_embeddings": True}
EXPERT_BYTES = 3 * 4096 * 1536 * 2
TP2_PP2 = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
RUNNER = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from mindspeed_llm.checkpoint.convert import main
from mindspeed_llm.checkpoint.formats import blocks
ready, write, first = time.monotonic(), blocks.write_values, []
def watched(*arguments):
    first or first.append(time.monotonic())
    write(*arguments)
blocks.write_values = watched
main(sys.argv[2:])
done = time.monotonic()
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("MEASURED", json.dumps({"seconds": done - ready, "first": first[0], "peak": peak / 1024}))
"""


def sparse_moe(gigabytes: float) -> dict[str, Any]:
    """The config of a mixture of experts of about this size: 8 layers of a 235B model's width."""
    layers, experts = 8, 8 * max(1, round(gigabytes * 1e9 / 8 / EXPERT_BYTES / 8))
    sizes = {"hidden_size": 4096, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4}
    mixture = {"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "norm_topk_prob": True}
    return {"architectures": ["Qwen3MoeForCausalLM"], **BASE, **sizes, **mixture, "tie_word_embeddings": False}


def make_model(folder: Path, config: dict[str, Any], holes: bool = False) -> int:
    """Write an HF folder of seeded random bf16 weights in shards of 5 GB; -> its bytes.

    Args:
        holes: leave the values out, so that the files take no room and read as zeros.
    """
    import numpy
    import torch

    from mindspeed_llm.checkpoint.formats.blocks import write_values
    from mindspeed_llm.checkpoint.formats.hf import INDEX, plan_shards, shard_files
    from mindspeed_llm.checkpoint.formats.safetensors_file import SafetensorsWriter
    from mindspeed_llm.checkpoint.tables import WeightTable
    from mindspeed_llm.models.config import ModelConfig

    class Shapes:
        """What the shards' plan needs to know of a source."""

        def __init__(self) -> None:
            self.table = WeightTable(ModelConfig.from_hf_dict(config, "benchmark"))

        def dtype(self, name: str) -> torch.dtype:
            return torch.bfloat16

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards = plan_shards(Shapes(), 5 * 10**9)
    files = shard_files(len(shards))
    pool = torch.from_numpy(numpy.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(numpy.float32)).bfloat16()
    total = 0
    for file, tensors in zip(files, shards, strict=True):
        writer = SafetensorsWriter(folder / file, tensors)
        for number, (name, (_, shape)) in enumerate(tensors.items()):
            place, left = writer.place(name), 0 if holes else int(numpy.prod(shape))
            offset = place.offset
            while left:
                start = number * 7919 % (pool.numel() // 2)
                part = pool[start : start + min(left, pool.numel() // 2)]
                write_values(place.descriptor, offset, part)
                offset, left = offset + part.nbytes, left - part.numel()
        writer.close()
        total += writer.nbytes
    if len(files) > 1:
        where = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    return total


def convert(load: Path, save: Path, *more: str) -> dict[str, float]:
    """One conversion in a fresh process: seconds after the imports, seconds to the first byte, peak MiB."""
    shutil.rmtree(save, ignore_errors=True)
    words = [sys.executable, "-c", RUNNER, str(REPO), "--load-dir", str(load), "--save-dir", str(save), *more]
    started = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    line = next(line for line in done.stdout.splitlines() if line.startswith("MEASURED"))
    measured = json.loads(line.removeprefix("MEASURED"))
    return {**measured, "first": measured["first"] - started, "whole": time.monotonic() - started}


def copy(source: Path, target: Path) -> float:
    """Seconds of `cp` and `sync` of one file."""
    target.unlink(missing_ok=True)
    started = time.monotonic()
    subprocess.run(["cp", str(source), str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)
    return time.monotonic() - started


def compare(work: Path, hf: Path, rounds: int) -> dict[str, Any]:
    """The best of some interleaved rounds, the first one discarded."""
    seen: dict[str, list[Any]] = {}
    for number in range(rounds + 1):
        found = {
            "hf -> mg TP1 PP1": convert(hf, work / "mg11"),
            "hf -> mg TP2 PP2": convert(hf, work / "mg22", *TP2_PP2),
            "copy": copy(hf / "model.safetensors", work / "copy"),
            "mg TP1 PP1 -> hf": convert(work / "mg11", work / "hf11"),
            "mg TP2 PP2 -> hf": convert(work / "mg22", work / "hf22"),
        }
        for name, value in found.items():
            seen.setdefault(name, []).append(value)
        took = {name: value if name == "copy" else value["seconds"] for name, value in found.items()}
        print(f"round {number}: " + ", ".join(f"{name} {value:.2f} s" for name, value in took.items()), flush=True)
    for folder in ("hf11", "hf22"):
        same = subprocess.run(["cmp", str(hf / "model.safetensors"), str(work / folder / "model.safetensors")])
        print(f"{folder}: {'the original byte for byte' if same.returncode == 0 else 'another file (header)'}")
    best: dict[str, Any] = {"copy": min(seen.pop("copy")[1:])}
    for name, runs in seen.items():
        kept = runs[1:]
        best[name] = {key: min(run[key] for run in kept) for key in ("seconds", "first", "whole")}
        best[name]["peak"] = max(run["peak"] for run in runs)
    return best


def machine() -> str:
    """Processor, cores and torch, for the results."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, torch {torch.__version__}"


def table(best: dict[str, Any]) -> list[str]:
    """The results as a Markdown table."""
    limit = best["copy"]
    lines = [
        f"{date.today()}; {machine()}; Qwen3-0.6B shapes, 1.2 GB bf16; `cp` and `sync` of the file: {limit:.2f} s",
        "",
        "| conversion | s after imports | / copy | goal 1.5 x copy + 1.5 s | first byte s | whole s | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in best.items():
        if name == "copy":
            continue
        goal = 1.5 * limit + 1.5
        verdict = f"{goal:.2f} s, {'met' if one['seconds'] <= goal else 'missed'}"
        lines.append(
            f"| {name} | {one['seconds']:.2f} | {one['seconds'] / limit:.2f}x | {verdict} | {one['first']:.2f} |"
            f" {one['whole']:.2f} | {one['peak']:.0f} |"
        )
    return lines


def write_section(title: str, lines: list[str]) -> None:
    """Put a section into the results, in place of an earlier one of that title."""
    text = RESULTS.read_text(encoding="utf-8")
    parts = text.split("\n## ")
    kept = [part for part in parts if not part.startswith(title.removeprefix("## "))]
    section = title.removeprefix("## ") + "\n\n" + "\n".join(lines) + "\n"
    RESULTS.write_text("\n## ".join([*kept[:1], *(part.rstrip("\n") + "\n" for part in kept[1:]), section]))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; one more comes first")
    parser.add_argument("--given", type=Path, help="an HF folder of one model.safetensors to use instead")
    parser.add_argument("--work", type=Path, help="folder for models and results; a temporary one when left out")
    parser.add_argument("--scale", type=float, help="convert a mixture of experts of about so many GB instead")
    parser.add_argument("--write", action="store_true", help=f"write the result into {RESULTS.name}")
    options = parser.parse_args()
    sys.path.insert(0, str(REPO))
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        if options.scale:
            size = make_model(work / "hf", sparse_moe(options.scale), holes=True)
            more = [*TP2_PP2, "--target-expert-parallel-size", "2", "--moe-grouped-gemm"]
            one = convert(work / "hf", work / "mg", *more)
            lines = [
                f"{date.today()}; {machine()}; a mixture of experts of {size / 1e9:.1f} GB, hf -> mg TP2 PP2 EP2,"
                f" grouped: {one['seconds']:.0f} s ({size / one['seconds'] / 1e6:.0f} MB/s), peak {one['peak']:.0f} MiB"
                " (goal: 600 MiB apart from one tensor)"
            ]
            title = f"{TITLE} of a large model"
        else:
            hf = options.given or work / "hf"
            if not options.given:
                make_model(hf, DENSE)
            lines, title = table(compare(work, hf, options.rounds)), f"{TITLE}, hf and mg"
        print("\n".join(lines))
        if options.write:
            write_section(title, lines)


if __name__ == "__main__":
    main()
