"""megatron-core's own loader, model and optimizer take up a torch_dist checkpoint of a training run."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.formats.mcore_writer import local_share
from mindspeed_llm.checkpoint.tables import EMBEDDING, OUTPUT_LAYER, logical_name
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.training.optimizer_state import FIELDS
from tests.distributed.pool import pool
from tests.fixtures import done, hf_model, launch, scratch, training

STEPS = 3


@cache
def saved(ckpt_format: str, bf16: bool) -> Path:
    """A whole model after two steps in one process."""
    dtype = "bfloat16" if bf16 else "float32"
    save = scratch() / f"resumes_{ckpt_format}_{dtype}"
    more = ("--load", hf_model(dtype=dtype), "--ckpt-format", ckpt_format, *(("--bf16",) if bf16 else ()))
    done(launch(1, "posttrain_gpt.py", training(save, *more, lora=False, steps=STEPS)))
    return save


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "bf16": (1, {"bf16": True}),
    "distributed optimizer": (2, {"distributed": True}),
    "distributed optimizer, bf16": (2, {"distributed": True, "bf16": True}),
    "TP2 PP2": (4, {"tp": 2, "pp": 2}),
    "TP2, distributed optimizer": (4, {"tp": 2, "distributed": True, "bf16": True}),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_megatron_core_resumes_from_weights_and_optimizer_state(name: str) -> None:
    """The reference are the rank files that the same run writes."""
    size, layout = CASES[name]
    bf16, tp = layout.get("bf16", False), layout.get("tp", 1)
    folder = saved("torch_dist", bf16) / f"iter_{STEPS:07d}"
    model = ModelConfig.from_hf(hf_model(dtype="bfloat16" if bf16 else "float32"))
    answers = pool(size).run("tests.checkpoint.dist_worker:resume", model=model, folder=folder, **layout)
    wanted = MegatronCheckpoint(saved("torch", bf16))
    fields = {field: wanted.section("optimizer", field) for field in FIELDS}
    for rank in answers:
        sections = {"weights": (wanted.base(), rank.held.tensors)}
        sections |= {field: (source, rank.state[field]) for field, source in fields.items()}
        for section, (source, found) in sections.items():
            for local, values in found.items():
                where = logical_name(local, rank.held.first_layer)
                padded = values.shape[0] * tp if where in (EMBEDDING, OUTPUT_LAYER) else None
                share = local_share(source, where, tp, rank.held.tp_rank, padded).float()
                # what padding rows hold is nobody's concern
                rows = len(values) if padded is None else model.vocab_size - rank.held.tp_rank * len(values)
                assert torch.equal(torch.from_numpy(values[:rows]).float(), share[:rows]), (section, local)
        assert rank.steps == {STEPS}
        assert {group["wd_mult"] for group in rank.groups} == {0.0, 1.0}
