"""megatron-core's own loader, model and optimizer take up a torch_dist checkpoint of a training run."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.formats.mcore_writer import local_share
from mindspeed_llm.checkpoint.tables import EMBEDDING, OUTPUT_LAYER, expert_number, logical_name
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.training.optimizer_state import FIELDS
from tests.distributed.pool import pool
from tests.fixtures import done, hf_model, launch, scratch, training
from tests.training.test_experts import moe_model

STEPS = 3


def start(kind: str) -> Path:
    """The HF folder a run begins with: "float32", "bfloat16" or "experts"."""
    return moe_model() if kind == "experts" else hf_model(dtype=kind)


@cache
def saved(ckpt_format: str, kind: str, ep: int) -> Path:
    """A whole model after some steps."""
    save = scratch() / f"resumes_{ckpt_format}_{kind}_{ep}"
    more = ("--load", start(kind), "--ckpt-format", ckpt_format, *(("--bf16",) if kind == "bfloat16" else ()))
    more += ("--expert-model-parallel-size", ep, "--expert-tensor-parallel-size", 1) if ep > 1 else ()
    done(launch(ep, "posttrain_gpt.py", training(save, *more, lora=False, steps=STEPS)))
    return save


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "bf16": (1, {"bf16": True}),
    "distributed optimizer": (2, {"distributed": True}),
    "distributed optimizer, bf16": (2, {"distributed": True, "bf16": True}),
    "experts": (1, {}),
    "experts, EP2": (2, {"ep": 2}),
    "experts, EP2, distributed optimizer": (2, {"ep": 2, "distributed": True}),
    "TP2 PP2": (4, {"tp": 2, "pp": 2}),
    "TP2, distributed optimizer": (4, {"tp": 2, "distributed": True, "bf16": True}),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_megatron_core_resumes_from_weights_and_optimizer_state(name: str) -> None:
    """The reference are the rank files that the same run writes."""
    size, layout = CASES[name]
    kind = "bfloat16" if layout.get("bf16") else "experts" if "experts" in name else "float32"
    tp, ep = layout.get("tp", 1), layout.get("ep", 1)
    folder = saved("torch_dist", kind, ep) / f"iter_{STEPS:07d}"
    model = ModelConfig.from_hf(start(kind))
    answers = pool(size).run("tests.checkpoint.dist_worker:resume", model=model, folder=folder, **layout)
    wanted = MegatronCheckpoint(saved("torch", kind, ep))
    fields = {field: wanted.section("optimizer", field) for field in FIELDS}
    for rank in answers:
        sections = {"weights": (wanted.base(), rank.held.tensors)}
        sections |= {field: (source, rank.state[field]) for field, source in fields.items()}
        for section, (source, found) in sections.items():
            for local, values in found.items():
                first, _, part, parts = rank.held.expert_place
                where = logical_name(local, rank.held.first_layer, first_expert=first)
                cut = (tp, rank.held.tp_rank) if expert_number(where) is None else (parts, part)
                padded = values.shape[0] * tp if where in (EMBEDDING, OUTPUT_LAYER) else None
                share = local_share(source, where, *cut, padded).float()
                # what padding rows hold is nobody's concern
                rows = len(values) if padded is None else model.vocab_size - rank.held.tp_rank * len(values)
                assert torch.equal(torch.from_numpy(values[:rows]).float(), share[:rows]), (section, local)
        assert rank.steps == {STEPS}
        assert {group["wd_mult"] for group in rank.groups} == {0.0, 1.0}
