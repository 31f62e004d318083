"""Conversions over families, layouts and formats, seeded, so that every two values meet: the page docs/weights.md.

    python -m tests.checkpoint.matrix          runs all of them and writes docs/weights.md

Each case converts a family's tiny model into a first format and layout, that result into a second one, and holds
name, type, shape and bytes of every HF tensor read back from it against the original.
"""

import contextlib
import io
import itertools
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from mindspeed_llm.checkpoint.adapters.export import write_peft
from mindspeed_llm.checkpoint.adapters.factors import AdapterTensors
from mindspeed_llm.checkpoint.adapters.settings import settings_of
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.convert import main
from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.lazy import InMemory
from mindspeed_llm.checkpoint.open import open_base
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families.base import Kind
from tests.checkpoint.families import TINY, hf_values, make_family
from tests.conftest import REPO

SEED = 20
PAGE = REPO / "docs" / "weights.md"
LAYOUTS: dict[str, str] = {
    "1 rank": "",
    "TP2": "--target-tensor-parallel-size 2",
    "TP4": "--target-tensor-parallel-size 4",
    "PP2": "--target-pipeline-parallel-size 2",
    "PP4": "--target-pipeline-parallel-size 4",
    "TP2 PP2": "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2",
    "PP2 VPP2": "--target-pipeline-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    "PP2 V-shaped": "--target-pipeline-parallel-size 2 --schedules-method dualpipev",
    "PP2 of 3 and 1 layers": "--target-pipeline-parallel-size 2 --num-layer-list 3,1",
    "PP2 with no-op layers": "--target-pipeline-parallel-size 2 --noop-layers 0,4",
    "TP2 padded": "--target-tensor-parallel-size 2 --make-vocab-size-divisible-by 16",
    "EP2": "--target-expert-parallel-size 2",
    "TP2 EP2": "--target-tensor-parallel-size 2 --target-expert-parallel-size 2",
    "TP2 EP4 ETP1": "--target-tensor-parallel-size 2 --target-expert-parallel-size 4 --expert-tensor-parallel-size 1",
    "TP2 extending EP2": "--target-tensor-parallel-size 2 --target-expert-parallel-size 2 --moe-tp-extend-ep",
    "PP2 EP2": "--target-pipeline-parallel-size 2 --target-expert-parallel-size 2",
    "any": "",
}
"""Target layouts. "any" is the place of formats that have no layout."""
FORMATS: dict[str, str] = {
    "hf": "--save-model-type hf",
    "torch": "--save-model-type mg",
    "torch, grouped experts": "--save-model-type mg --moe-grouped-gemm",
    "torch, transformer_engine": "--save-model-type mg --transformer-impl transformer_engine",
    "torch, transformer_engine, grouped": (
        "--save-model-type mg --transformer-impl transformer_engine --moe-grouped-gemm"
    ),
    "torch_dist": "--save-model-type mg --ckpt-format torch_dist",
}
WITHOUT_LAYOUT = ("hf", "torch_dist")


class Case(NamedTuple):
    """One conversion from a first format and layout to a second."""

    family: str
    format_in: str
    layout_in: str
    format_out: str
    layout_out: str

    def __str__(self) -> str:
        return "-".join(self).replace(" ", "_").replace(",", "")


@cache
def model(family: str) -> ModelConfig:
    """The tiny model's sizes."""
    return ModelConfig.from_hf_dict(hf_values(family), family)


def reason(family: str, format_name: str, layout: str) -> str:
    """Why a family cannot have this format in this layout; empty when it can."""
    config = model(family)
    if (format_name in WITHOUT_LAYOUT) != (layout == "any"):
        return "the format has no layout" if format_name in WITHOUT_LAYOUT else "the format needs a layout"
    if not config.num_experts and ("EP" in layout or "grouped" in format_name):
        return "the family has no experts"
    return ""


def valid_sides(family: str) -> list[tuple[str, str]]:
    """(format, layout) pairs a family can have."""
    return [side for side in itertools.product(FORMATS, LAYOUTS) if not reason(family, *side)]


def pairs(case: Case) -> Iterator[tuple]:
    """The pairs of values that meet in a case."""
    return itertools.combinations(enumerate(case), 2)


def cases(seed: int = SEED) -> list[Case]:
    """Seeded cases until every possible pair of values has met: the best of some random candidates each time."""
    generator = random.Random(seed)
    sides = {family: valid_sides(family) for family in TINY}
    wanted = set()
    for family, found in sides.items():
        for one, other in itertools.product(found, found):
            wanted.update(pairs(Case(family, *one, *other)))
    chosen: list[Case] = []
    while wanted:
        family, missing = generator.choice(list(TINY)), generator.choice(sorted(wanted, key=str))
        candidates = [Case(family, *generator.choice(sides[family]), *generator.choice(sides[family]))]
        for _ in range(400):
            family = generator.choice(list(TINY))
            case = Case(family, *generator.choice(sides[family]), *generator.choice(sides[family]))
            if missing in set(pairs(case)):
                candidates.append(case)
        best = max(candidates, key=lambda case: len(wanted & set(pairs(case))))
        if wanted & set(pairs(best)):
            chosen.append(best)
            wanted -= set(pairs(best))
    return chosen


@cache
def original(family: str) -> tuple[Path, str]:
    """The family's tiny HF folder and its content hash."""
    folder = make_family(family, Path(tempfile.mkdtemp(prefix="weights_")) / family)
    return folder, content_hash(HFSource(folder))


def convert(source: Path, result: Path, format_name: str, layout: str) -> None:
    """One conversion by the command line."""
    words = f"--load-dir {source} --save-dir {result} {FORMATS[format_name]} {LAYOUTS[layout]}"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(words.split()) == 0


def run_case(case: Case, folder: Path) -> None:
    """Run a case in an empty folder; `AssertionError` when a tensor does not arrive."""
    source, expected = original(case.family)
    first, second = folder / "first", folder / "second"
    if case.format_in == "hf":
        first = source
    else:
        convert(source, first, case.format_in, case.layout_in)
    if case.format_in == case.format_out == "hf":
        shutil.copytree(first, second)
    else:
        convert(first, second, case.format_out, case.layout_out)
    found = content_hash(open_base(second))
    assert found == expected, f"{case}: content {found[:12]}, not {expected[:12]}"


class AdapterCase(NamedTuple):
    """A PEFT folder to a Megatron LoRA checkpoint, that to another layout, and that back."""

    family: str
    layout_in: str
    layout_out: str

    def __str__(self) -> str:
        return "-".join(self).replace(" ", "_").replace(",", "")


def adapter_cases(seed: int = SEED) -> list[AdapterCase]:
    """Seeded cases in which every family meets every layout it can have, on both sides."""
    generator = random.Random(seed)
    found = []
    for family in TINY:
        layouts = [layout for layout in LAYOUTS if not reason(family, "torch", layout) and layout != "TP2 padded"]
        other = generator.sample(layouts, len(layouts))
        found += [AdapterCase(family, *pair) for pair in zip(layouts, other, strict=True)]
    return found


def linear_modules(table: WeightTable) -> list[str]:
    """The logical modules of the decoder that LoRA adapts: its linear layers, experts' too."""
    kinds = (Kind.COLUMN, Kind.ROW, Kind.QKV, Kind.GATED)
    entries = [entry for entry in table.entries.values() if entry.kind in kinds and len(entry.shape) == 2]
    return [entry.name.removesuffix(".weight") for entry in entries if entry.name.startswith("decoder.layers.")]


@cache
def original_adapter(family: str) -> Path:
    """A PEFT folder with random factors of rank 3 on every linear layer of the family's tiny model."""
    folder, _ = original(family)
    table = HFSource(folder).table
    generator = torch.Generator().manual_seed(SEED)
    modules = linear_modules(table)
    tensors: dict[str, InMemory] = {}
    for module in modules:
        rows, columns = table.entries[f"{module}.weight"].shape
        tensors[f"{module}.lora_A.weight"] = InMemory(torch.randn(3, columns, generator=generator))
        tensors[f"{module}.lora_B.weight"] = InMemory(torch.randn(rows, 3, generator=generator))
    settings = settings_of(dict.fromkeys(modules, 3), dict.fromkeys(modules, 2.0), table)
    lora = LoraSource(AdapterTensors(folder, table, tensors), settings, None, None, None)
    write_peft(lora, folder.parent / "peft", str(folder))
    return folder.parent / "peft"


def run_adapter_case(case: AdapterCase, folder: Path) -> None:
    """Run a case in an empty folder; `AssertionError` when a factor does not arrive."""
    base, _ = original(case.family)
    first = original_adapter(case.family)
    steps = [("first", LAYOUTS[case.layout_in]), ("second", LAYOUTS[case.layout_out]), ("back", "--save-lora-to-hf")]
    load = first
    for name, flags in steps:
        words = f"--load-dir {base} --lora-load {load} --save-dir {folder / name} --merge-lora false {flags}"
        words += "" if name == "back" else " --save-model-type mg"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main(words.split()) == 0
        load = folder / name
    expected, found = (load_file(path / "adapter_model.safetensors") for path in (first, load))
    assert set(found) == set(expected), case
    assert all(torch.equal(found[name], values) for name, values in expected.items()), case


def page(done: list[Case], adapters: list[AdapterCase]) -> str:
    """The table of what was run."""
    lines = [
        "# Weights: families, formats, layouts",
        "",
        "Generated by `python -m tests.checkpoint.matrix`; `tests/checkpoint/test_matrix.py` runs the same cases.",
        "",
        f"{len(done)} conversions, seed {SEED}, chosen so that every two possible values of (family, first format,",
        "first layout, second format, second layout) meet in at least one. Each wrote a tiny model of the family",
        "(unequal sizes: heads x head size is not the hidden size, fewer key heads than query heads, 4 layers, a",
        "vocabulary of 67) in the first format and layout, converted that to the second, and compared name, type,",
        "shape and bytes of every hub tensor with the original. All were bit-equal. That the tensors mean the same to",
        "the network is shown elsewhere: `tests/models/test_parity*.py` compare logits with transformers.",
        "",
        "## Cases by first and second format",
        "",
        "| first \\ second | " + " | ".join(FORMATS) + " |",
        "|---" * (len(FORMATS) + 1) + "|",
    ]
    for one in FORMATS:
        counts = [sum(c.format_in == one and c.format_out == other for c in done) for other in FORMATS]
        lines.append(f"| {one} | " + " | ".join(map(str, counts)) + " |")
    sides = [layout for layout in LAYOUTS if layout != "any"]
    lines += ["", "## Cases by family and layout (as first + as second)", ""]
    lines += ["none: the family has no experts, which this layout or format is about.", ""]
    lines += ["| family | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for family in TINY:
        cells = []
        for layout in sides:
            used = [c for c in done if c.family == family]
            count = sum(c.layout_in == layout for c in used), sum(c.layout_out == layout for c in used)
            empty = reason(family, "torch", layout)
            cells.append("none" if empty else f"{count[0]} + {count[1]}")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    lines += ["", "## Cases by family and format (as first + as second)", ""]
    lines += ["| family | " + " | ".join(FORMATS) + " |", "|---" * (len(FORMATS) + 1) + "|"]
    for family in TINY:
        cells = []
        for name in FORMATS:
            used = [c for c in done if c.family == family]
            count = sum(c.format_in == name for c in used), sum(c.format_out == name for c in used)
            empty = reason(family, name, "any" if name in WITHOUT_LAYOUT else "1 rank")
            cells.append("none" if empty else f"{count[0]} + {count[1]}")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Adapters",
        "",
        f"{len(adapters)} more conversions of adapters alone: a PEFT folder with factors on every linear layer of the",
        "family (experts' too) to a Megatron LoRA checkpoint, that to one of another layout, and that back to a PEFT",
        "folder, every factor bit-equal. Every family meets every layout it can have on both sides.",
    ]
    return "\n".join(lines) + "\n"


def write_page() -> int:
    """Run every case and write the page; the number of failures is the exit status."""
    chosen, adapters, failures = cases(), adapter_cases(), 0
    for case in [*chosen, *adapters]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                (run_case if isinstance(case, Case) else run_adapter_case)(case, Path(folder))
            except Exception as error:  # every case is to be run; the page is written only when none failed
                failures += 1
                print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"{len(chosen)} conversions, {len(adapters)} of adapters, {failures} failures")
    if not failures:
        PAGE.write_text(page(chosen, adapters), encoding="utf-8")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(write_page())
