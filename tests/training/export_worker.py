"""What pool processes run for exports without training: load, export, count. Imports megatron-core."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from mindspeed_llm import device
from mindspeed_llm.checkpoint.formats import lazy
from mindspeed_llm.checkpoint.formats.hf import HfFiles
from mindspeed_llm.checkpoint.layout import ExpertShare
from mindspeed_llm.checkpoint.live import live_tensors, load_live
from mindspeed_llm.checkpoint.open import open_base
from mindspeed_llm.models import gpt, parallel
from mindspeed_llm.training import export
from tests.training.faults import replaced


def build(folder: Path, layout: dict[str, Any]) -> tuple[Any, list[Any]]:
    """(source, loaded chunks) of this rank; megatron-core's groups are started."""
    engine = gpt.EngineOptions(**layout)
    chosen = device.select("cpu")
    base = open_base(folder)
    virtual = engine.virtual_stages(base.config.num_layers)
    parallel.start(
        chosen, engine.tensor, engine.pipeline, virtual, expert=engine.expert, expert_tensor=engine.expert_tensor
    )
    chunks = gpt.build_chunks(base.config, engine, chosen)
    rank = parallel_state.get_tensor_model_parallel_rank()
    experts = ExpertShare(*parallel.expert_place(base.config.num_experts))
    for chunk in chunks:
        load_live(live_tensors(chunk), base, rank, engine.tensor, chunk.first_layer, experts=experts)
    return base, chunks


def exported(rank: int, folder: Path, target: Path, **layout: Any) -> tuple[list[str], int]:
    """Export a loaded model; -> (the tensors this rank wrote, the most bytes of shares it held at once)."""
    wrote: list[str] = []
    most = [0]

    def seen(write: Any) -> Any:
        def noted(files: Any, source: Any, name: str) -> int:
            wrote.append(name)
            most[0] = max(most[0], sum(one.tensor.nbytes for t in source.tensors.values() for one in t.parts))
            return write(files, source, name)

        return noted

    try:
        base, chunks = build(folder, layout)
        dtype = str(layout.get("dtype", torch.float32)).removeprefix("torch.")
        model = export.dataclasses.replace(base.config, dtype=dtype)
        plan = export.Export(20_000, True, False, folder, str(folder), None)
        with replaced(HfFiles, "write", seen):
            export.export_model(chunks, model, target, plan, torch.device("cpu"))
        return wrote, most[0]
    finally:
        parallel.stop()


def read_bytes(rank: int, folder: Path, **layout: Any) -> dict[str, int]:
    """Bytes this rank takes from the files while it loads a model: copied values, and pages of mappings it touches."""
    return {}


_ = lazy
