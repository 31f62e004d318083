"""`docs/layouts.md`, made from the cases the tests run: `python -m tests.distributed.layouts` writes it anew."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.cases import Case
from tests.distributed.test_layouts import ADAPTERS, FULL_TUNING
from tests.distributed.test_moe_layouts import EVERY

DOCUMENT = Path(__file__).parents[2] / "docs" / "layouts.md"
NAMES = {
    "qwen3": "Dense (Qwen3)",
    "qwen3-moe": "Qwen3-MoE",
    "qwen3-moe-late": "Qwen3-MoE whose first two of four layers are dense",
    "mixtral": "Mixtral",
    "qwen2-moe": "Qwen2-MoE (a shared expert behind a gate)",
    "glm4-moe": "GLM-4 MoE",
    "deepseek-v3": "DeepSeek-V3 (latent attention)",
    "deepseek-v2": "DeepSeek-V2-lite (latent attention, plain q)",
    "gpt-oss": "gpt-oss",
}
FEATURES: dict[str, Callable[[Case], bool]] = {
    "adapter": lambda case: case.lora,
    "fused": lambda case: case.lora and case.fused,
    "fused MLP": lambda case: case.lora and case.fused_mlp,
    "all weights": lambda case: not case.lora,
    "routers whole": lambda case: case.routers,
    "experts apart": lambda case: case.apart,
    "distributed optimizer": lambda case: case.distributed_optimizer,
    "overlap": lambda case: case.overlap,
    "recompute": lambda case: case.recompute is not None,
    "balance, z loss": lambda case: bool(case.balance or case.z_loss),
    "per-token loss": lambda case: case.per_token,
    "one length": lambda case: not case.ragged and not case.packed,
    "packed": lambda case: case.packed,
    "tied": lambda case: case.tied,
}


@dataclass(frozen=True)
class Defect:
    """One of megatron-core's.

    Attributes:
        number: as errors, comments and tests name it; 1 to 13 are those found first.
        what: it does. instead: what we do. shown: the test that shows it is still there.
    """

    number: int
    what: str
    instead: str
    shown: str


FAULTS = "test_expert_faults.py"
DEFECTS = (
    Defect(1, "`WrappedTorchNorm` asserts that there is no sequence parallelism", "own norm layer", "test_defects.py"),
    Defect(
        2,
        "interleaved stages with default messages get each other's gradients",
        "`overlap_p2p_comm`, not `batch_p2p_comm`, under VPP",
        FAULTS,
    ),
    Defect(
        3,
        "without EP, experts that are whole on every TP rank (ETP below TP) are completed over the dense group",
        "every expert parameter says itself that it is one: exact",
        FAULTS,
    ),
    Defect(4, "`min_lr` left out fails in the schedule", "it is always given", "test_defects.py"),
    Defect(5, "a loss given as a pair is multiplied by CP", "loss, count and report are given", FAULTS),
    Defect(
        6,
        "a configuration that knows the optimizer cannot be copied, as experts do",
        "all chunks are built before the optimizer",
        "test_defects.py",
    ),
    Defect(10, "`DotProductAttention` asserts that CP is 1", "own attention", "test_defects.py"),
    Defect(11, "full recomputation below a frozen embedding gives no gradient", "its output asks for one", FAULTS),
    Defect(
        14,
        "under per-token loss the balancing loss is weighed by all tokens, and gradients are divided by trained ones",
        "own balancing and z loss, which count 1 / (micro-batches x DP) in every case",
        "test_defects.py",
    ),
    Defect(
        15,
        "the bias of an expert's second layer is marked to be summed over TP, over which experts differ at ETP 1",
        "the mark is taken away, and the sum is over ETP",
        "test_defects.py",
    ),
    Defect(
        16,
        "under sequence parallelism only the first pipeline stage cuts the padding mask",
        "every stage cuts it",
        "test_defects.py",
    ),
    Defect(17, "experts under TP without sequence parallelism raise in training", "refused", "test_defects.py"),
)  # fmt: skip
REFUSED = (
    ("experts, TP above 1 without `--sequence-parallel` (defect 17)", "tests/training/test_experts.py"),
    ("experts that EP does not divide", "tests/training/test_experts.py"),
    ("ETP that does not divide TP", "tests/training/test_experts.py"),
    ("EP or ETP of a dense model", "tests/training/test_experts.py"),
    ("TP that does not divide the key-value heads: they are not replicated", "tests/training/test_bad_input.py"),
    ("a PP or VPP that does not divide the layers", "tests/training/test_bad_input.py"),
    ("under VPP, micro-batches that PP does not divide", "tests/training/test_bad_input.py"),
    ("a fixed `--seq-length` that TP with SP, or twice CP, does not divide", "tests/training/test_experts.py"),
    ("CP in inference and evaluation", "tests/training/test_experts.py"),
)
HEAD = """# Layouts: what is trained exactly, what is refused

Made by `python -m tests.distributed.layouts` from the cases the tests run; a test keeps it true.

**Exact** means: tiny models with every value redrawn, fp32, gloo. Logits, losses and every gradient equal those of
transformers with peft within 1e-5 of each tensor's largest value, over four steps of AdamW with clipping; gradient
norms within 5e-5. Adapters sit on every linear layer, attention and experts alike; peft adapts the blocks of all
experts of a layer. Balance is Switch Transformer's loss, layer by layer, on the scores of transformers' routers.
Base weights stay bit-equal, replicas are bit-equal. An empty cell is not tested.

TP tensor, SP sequence, PP pipeline, VPP interleaved, CP context, DP data, EP expert, ETP expert-tensor parallelism;
ETP is TP where it is not named.
"""
NOTES = """
## Notes

- **The truth** of adapters and of models with experts is transformers with peft in float64, its own casts to float32
  left out. Of layouts that were far from it in float32, three are computed in float64 here too: they are within 5e-7,
  the rounding of megatron-core's float32 gradient buffers.
- **Context parallelism** gathers keys and values; every process has an early and a late piece of the sequence. Windows,
  sinks and latent attention work as without. Lengths are padded to a multiple of twice CP. Packed rows are cut each for
  itself where they are longer than 1,024 tokens or than a process's piece; what is left over, as one sequence.
- **Experts** of a process are computed together, in one grouped product per layer; **apart**
  (`--moe-grouped-gemm false`) one after another. An expert's adapter has its own A and B; under ETP they are cut as the
  expert is. The factor that is whole on every part is completed over ETP once a step.
- **Routers** are frozen with adapters, unless `all-router` adapts them or `--lora-modules-to-save router` trains them
  whole, and trained with all weights. The correction of DeepSeek-V3 and GLM-4 MoE stays.
- **Gradient norm**: the root of the sum of squares of dense and expert parameters, each counted once.
- **Checkpoints**: optimizer state is stored by parameter, so a run goes on at any other layout (defect 8 of
  megatron-core's own format does not arise).
- **A deviation from the fourth step on** was once seen at TP2 SP EP2 ETP1 (5.77432 against 5.77448). Here the layout
  is exact over all steps, norms included. The likely cause is Adam: with an epsilon of 1e-8 the first update is the
  learning rate times the sign of each gradient, also of those that are rounding alone, and sums in another order give
  them another sign. One process with full recomputation and a balancing loss parts from transformers in the same way
  (8e-5 of the loss after four steps), while no router's choice is closer than 1.4e-4. With an epsilon of 1e-4 all
  layouts agree over all steps, so the tests use it.
"""


def layout_of(case: Case) -> str:
    """ "TP2 SP EP2 ETP1"."""
    said = [
        f"TP{case.tensor}" if case.tensor > 1 else "",
        "SP" if case.sequence_parallel else "",
        f"PP{case.pipeline}" if case.pipeline > 1 else "",
        "VPP2" if case.virtual_layers else "",
        f"CP{case.context}" if case.context > 1 else "",
        f"EP{case.expert}" if case.expert > 1 else "",
        f"ETP{case.expert_tensor}" if case.expert_tensor else "",
        f"DP{case.replicas}" if case.replicas > 1 else "",
    ]
    return " ".join(word for word in said if word) or "one process"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def exact_layouts(model: str, cases: list[Case]) -> list[str]:
    """The table of one model; features nothing tests for it have no column."""
    features = [name for name, has in FEATURES.items() if any(has(case) for case in cases)]
    layouts = list(dict.fromkeys(layout_of(case) for case in cases))
    rows = []
    for layout in sorted(layouts, key=lambda name: (name != "one process", name.count(" "), name)):
        own = [case for case in cases if layout_of(case) == layout]
        rows.append([layout, *("exact" if any(FEATURES[name](case) for case in own) else "" for name in features)])
    return [f"\n## {NAMES[model]}\n", *table(["layout", *features], rows)]


def text() -> str:
    """The whole document."""
    cases = [*ADAPTERS, *FULL_TUNING, *EVERY]
    lines = [HEAD.rstrip()]
    for model in NAMES:
        lines += exact_layouts(model, [case for case in cases if case.model == model])
    lines += ["\n## Refused\n", "In one line that names both sides, before anything is built or written.\n"]
    lines += table(["what", "shown by"], ([what, f"`{where}`"] for what, where in REFUSED))
    lines += ["\n## Defects of megatron-core 0.16.1, and what is done about each\n"]
    lines += ["Each test shows that the defect is still there; those that trainings do not meet are left out.\n"]
    shown = ([str(one.number), one.what, one.instead, f"`tests/distributed/{one.shown}`"] for one in DEFECTS)
    lines += table(["number", "defect", "here", "shown by"], shown)
    return "\n".join(lines) + "\n" + NOTES


if __name__ == "__main__":
    DOCUMENT.write_text(text(), encoding="utf-8")
