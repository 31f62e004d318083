"""What pool processes run for the tests of the gate: conversions, faults in files and in tables. Imports megatron-core.

A fault of a file changes a finished result and has the gate look at it again. A fault of a table is there while the
conversion writes and while the gate reads, so a round trip cancels it.
"""

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.arguments.convert import ConvertOptions
from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.checkpoint import merge, tables
from mindspeed_llm.checkpoint.convert import main
from mindspeed_llm.checkpoint.convert_job import prepare, with_formats
from mindspeed_llm.checkpoint.kinds import AxisMap, Segment, hf_map
from mindspeed_llm.checkpoint.tables import HfPart, WeightTable
from mindspeed_llm.checkpoint.verify import networks
from mindspeed_llm.checkpoint.verify.gate import run_gate
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families import family
from mindspeed_llm.models.families.base import Family, Join, Kind, Weight

MODEL = "model.safetensors"
State = dict[str, torch.Tensor]


def convert(rank: int, words: Sequence[str], damage: str = "", table: str = "") -> dict[str, Any]:
    """Convert with the gate on; -> its report, exit status and standard output added.

    Args:
        damage: name of a fault here that changes the finished result, after which the gate looks at it again.
        table: name of a fault here that is active throughout.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said), FAULTS_OF_TABLES[table]() if table else contextlib.nullcontext():
        if damage:
            assert main(list(words)) == 0
            options = with_formats(parse(ConvertOptions, [*words, "--overwrite"], ConvertOptions.SCRIPT))
            job = prepare(options)
            FAULTS_OF_FILES[damage](job.final)
            status = 0 if run_gate(job, options).status == "PASS" else 1
        else:
            status = main([*words, "--test-convert-precision", "true"])
    saved = Path(words[words.index("--save-dir") + 1])
    report = json.loads((saved / "precision_report.json").read_text())
    return {**report, "status": status, "out": said.getvalue()}


def streamed(rank: int, words: Sequence[str], max_memory: str) -> dict[str, Any]:
    """`convert` with little memory; -> its report, and how many layers were in memory at most."""
    with patch.object(networks, "PROCESS_BYTES", 0):
        return convert(rank, [*words, "--max-memory", max_memory])


# --- faults of files


def change_hf(folder: Path, change: Callable[[State], None]) -> None:
    """Change the tensors of an HF folder."""
    tensors = load_file(folder / MODEL)
    change(tensors)
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / MODEL, metadata={"format": "pt"})


def change_ranks(folder: Path, change: Callable[[State], None], only: str = "mp_rank_*") -> None:
    """Change the tensors of rank files."""
    for path in sorted(folder.glob(f"{only}/model_optim_rng.pt")):
        content = torch.load(path, weights_only=False)
        change(content["model"])
        torch.save(content, path)


def swap(tensors: State, one: str, other: str) -> None:
    """Exchange two tensors."""
    tensors[one], tensors[other] = tensors[other], tensors[one]


def swapped_halves(state: State) -> None:
    """Gate below up, in every layer."""
    for name in [name for name in state if name.endswith("mlp.linear_fc1.weight")]:
        state[name] = state[name].roll(state[name].shape[0] // 2, 0)


def separated_groups(state: State) -> None:
    """All q rows, then all k, then all v: the order of other formats (2 groups of 3 query heads of size 10)."""
    for name in [name for name in state if name.endswith("linear_qkv.weight")]:
        grouped = state[name].view(2, 5, 10, -1)
        parts = [grouped[:, :3], grouped[:, 3:4], grouped[:, 4:]]
        state[name] = torch.cat([part.reshape(-1, grouped.shape[-1]) for part in parts])


def moved_heads(tensors: State) -> None:
    """The query heads of an HF folder dealt out to groups in turn."""
    for name in [name for name in tensors if name.endswith("q_proj.weight")]:
        tensors[name] = tensors[name].view(2, 3, 10, -1).transpose(0, 1).reshape(tensors[name].shape)


def one_expert_turned(state: State) -> None:
    """One square weight of one expert transposed."""
    name = "decoder.layers.1.mlp.experts.local_experts.2.linear_fc2.weight"
    state[name] = state[name].t().contiguous()


def one_hf_expert_turned(tensors: State) -> None:
    """The same in an HF folder that holds all experts in one tensor."""
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name][2] = tensors[name][2].t().clone()


def lower_alpha(tensors: State, base: Path, factor: float) -> None:
    """What was merged, times a factor."""
    before = load_file(base / MODEL)
    for name in tensors:
        delta = tensors[name].float() - before[name].float()
        tensors[name] = (before[name].float() + factor * delta).to(tensors[name].dtype)


def round_delta(tensors: State, folder: Path) -> None:
    """The sum with a delta that was rounded to bfloat16 first; the exact delta lies beside the result."""
    exact, base = (torch.load(folder.parent / file) for file in ("deltas.pt", "base.pt"))
    for name, delta in exact.items():
        tensors[name] = (base[name].float() + delta.to(torch.bfloat16).float()).to(torch.bfloat16)


def stored_head(tensors: State) -> None:
    """A tied folder with a head of its own, other than the embedding."""
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.5


def without_bias(state: State) -> None:
    """A layer whose q/k/v bias is not there."""
    del state["decoder.layers.1.self_attention.linear_qkv.bias"]


def without_hf_bias(tensors: State) -> None:
    """The same in an HF folder."""
    del tensors["model.layers.1.self_attn.q_proj.bias"]


def zero_bias(state: State) -> None:
    """A layer whose q/k/v bias is forgotten but declared."""
    state["decoder.layers.1.self_attention.linear_qkv.bias"].zero_()


def one_element(name: str, value: float) -> Callable[[State], None]:
    """A change of one element."""

    def change(state: State) -> None:
        state[name].view(-1)[3] = value

    return change


def add(name: str, value: float) -> Callable[[State], None]:
    """A change of a whole tensor."""

    def change(state: State) -> None:
        state[name] += value

    return change


LAST = "mp_rank_*_001"
FAULTS_OF_FILES: dict[str, Callable[[Path], None]] = {
    "nothing": lambda folder: None,
    "mg gate and up swapped": lambda folder: change_ranks(folder, swapped_halves),
    "hf gate and up swapped": lambda folder: change_hf(
        folder,
        lambda state: swap(state, "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"),
    ),
    "mg query groups apart": lambda folder: change_ranks(folder, separated_groups),
    "hf query heads moved": lambda folder: change_hf(folder, moved_heads),
    "mg expert transposed": lambda folder: change_ranks(folder, one_expert_turned),
    "hf expert transposed": lambda folder: change_hf(folder, one_hf_expert_turned),
    "mg bias missing": lambda folder: change_ranks(folder, without_bias),
    "hf bias missing": lambda folder: change_hf(folder, without_hf_bias),
    "mg bias zero": lambda folder: change_ranks(folder, zero_bias),
    "mg stale tied head": lambda folder: change_ranks(folder, add("output_layer.weight", 0.01), LAST),
    "hf stale tied head": lambda folder: change_hf(folder, stored_head),
    "hf alpha too low": lambda folder: change_hf(folder, lambda state: lower_alpha(state, folder.parent / "hf", 0.875)),
    "hf delta rounded": lambda folder: change_hf(folder, lambda state: round_delta(state, folder)),
    "mg NaN": lambda folder: change_ranks(
        folder, one_element("decoder.layers.0.mlp.linear_fc2.weight", float("nan")), "mp_rank_00*"
    ),
    "hf zeros": lambda folder: change_hf(folder, lambda state: state["model.layers.0.mlp.up_proj.weight"].zero_()),
    "mg replica differs": lambda folder: change_ranks(
        folder, add("decoder.layers.0.input_layernorm.weight", 0.01), "mp_rank_01*"
    ),
    "mg padding differs": lambda folder: change_ranks(
        folder, lambda state: state["embedding.word_embeddings.weight"][-1].add_(1.0), "mp_rank_01_000"
    ),
    "hf one element": lambda folder: change_hf(folder, one_element("model.layers.2.mlp.up_proj.weight", 0.123)),
}


# --- faults of tables


def rows_changed(change: Callable[[Weight], Weight | None]) -> Any:
    """Every family's table with rows changed, or left out where `change` gives None."""

    def changed(name: str) -> Family:
        one = family(name)
        rows = (change(row) for row in one.weights)
        return dataclasses.replace(one, weights=tuple(row for row in rows if row is not None))

    return patch.object(tables, "family", changed)


def gate_up_swapped() -> Any:
    """HF's up above HF's gate."""
    return rows_changed(
        lambda row: dataclasses.replace(row, hf=row.hf[::-1]) if row.name.endswith("fc1.weight") else row
    )


def groups_apart() -> Any:
    """q, k and v joined one after the other."""

    def apart(join: Join, config: ModelConfig, size: int) -> AxisMap:
        if join is not Join.QKV:
            return hf_map(join, config, size)
        heads, groups = config.num_attention_heads * config.kv_channels, config.num_query_groups * config.kv_channels
        return AxisMap(0, (Segment(0, 0, heads), Segment(1, 0, groups), Segment(2, 0, groups)), (0, 0, 0))

    return patch.object(tables, "hf_map", apart)


def expert_turned() -> Any:
    """One expert's place in a stacked HF tensor is believed to lie the other way round."""
    add_entry = WeightTable.add

    def turned(self: WeightTable, row: Weight, layer: int | None, expert: int | None) -> None:
        add_entry(self, row, layer, expert)
        name = next(reversed(self.entries))
        if name.endswith("layers.1.mlp.experts.local_experts.2.linear_fc2.weight"):
            entry = self.entries[name]
            hf = HfPart(entry.hf[0].name, entry.hf[0].expert, not entry.hf[0].transposed)
            self.entries[name] = dataclasses.replace(entry, hf=(hf,))

    return patch.object(WeightTable, "add", turned)


def bias_forgotten() -> Any:
    """No row for the bias of q, k and v."""
    return rows_changed(lambda row: None if row.name.endswith("linear_qkv.bias") else row)


@contextmanager
def bias_unknown() -> Iterator[None]:
    """The same, and the config mapping does not know of it either: our network has none."""
    from_hf = ModelConfig.from_hf.__func__

    def without(cls: type, folder: Path) -> ModelConfig:
        return dataclasses.replace(from_hf(cls, folder), add_qkv_bias=False)

    with bias_forgotten(), patch.object(ModelConfig, "from_hf", classmethod(without)):
        yield


def gated_is_column() -> Any:
    """Ranks hold blocks of all of fc1's rows, so that the first ones have gates only."""
    return rows_changed(lambda row: dataclasses.replace(row, kind=Kind.COLUMN) if row.kind is Kind.GATED else row)


def row_is_column() -> Any:
    """Ranks hold rows of the output projection instead of columns."""
    return rows_changed(
        lambda row: dataclasses.replace(row, kind=Kind.COLUMN) if row.name.endswith("linear_proj.weight") else row
    )


def head_is_embedding() -> Any:
    """An output layer that is taken from the embedding although the model has one of its own."""

    def change(row: Weight) -> Weight:
        if row.name != "output_layer.weight":
            return row
        return dataclasses.replace(row, hf=("model.embed_tokens.weight",))

    return rows_changed(change)


def merged_with(change: Callable[..., torch.Tensor]) -> Any:
    """The merge computes something else."""
    return patch.object(merge, "merged_weight", change)


def alpha_wrong() -> Any:
    """The merge scales by 15/16 of alpha / r."""
    right = merge.merged_weight
    return merged_with(lambda weight, a, b, scaling: right(weight, a, b, scaling * 0.9375))


def delta_rounded() -> Any:
    """The merge rounds B @ A to bfloat16 before it adds."""
    return merged_with(
        lambda weight, a, b, scaling: weight.float() + (scaling * (b.float() @ a.float())).to(torch.bfloat16).float()
    )


FAULTS_OF_TABLES: dict[str, Callable[[], Any]] = {
    "gate and up swapped": gate_up_swapped,
    "query groups apart": groups_apart,
    "expert transposed": expert_turned,
    "bias forgotten": bias_forgotten,
    "bias unknown": bias_unknown,
    "head is the embedding": head_is_embedding,
    "gated cut as column": gated_is_column,
    "row cut as column": row_is_column,
    "alpha wrong": alpha_wrong,
    "delta rounded": delta_rounded,
}
