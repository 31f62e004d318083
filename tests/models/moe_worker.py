"""What pool processes run for models with experts: our live model, loaded from an HF folder. Imports megatron-core."""

from pathlib import Path

import numpy
import torch
from megatron.core import parallel_state

from mindspeed_llm import device
from mindspeed_llm.checkpoint.live import ExpertPlace, live_tensors, load_live
from mindspeed_llm.checkpoint.open import open_base
from mindspeed_llm.models import gpt, parallel
from mindspeed_llm.models.causal_lm import CausalLM


def live_model(folder: Path, engine: gpt.EngineOptions) -> CausalLM:
    """This rank's loaded model; the groups exist."""
    base = open_base(folder)
    (chunk,) = gpt.build_chunks(base.config, engine, device.select("cpu"))
    rank = parallel_state.get_tensor_model_parallel_rank()
    experts = ExpertPlace(*parallel.expert_place(base.config.num_experts))
    load_live(live_tensors(chunk), base, rank, engine.tensor, chunk.first_layer, experts=experts)
    return chunk.eval()


@torch.no_grad()
def logits(rank: int, folder: Path, ids: numpy.ndarray, **layout: int | bool) -> numpy.ndarray:
    """Logits [rows, length, vocabulary] of a layout (fields of `EngineOptions`)."""
    engine = gpt.EngineOptions(**layout)
    parallel.start(
        device.select("cpu"),
        engine.tensor,
        engine.pipeline,
        expert=engine.expert,
        expert_tensor=engine.expert_tensor,
    )
    try:
        model = live_model(folder, engine)
        out = model(torch.from_numpy(ids), None, None, runtime_gather_output=True)
        return out[..., : model.vocabulary].numpy().copy()
    finally:
        parallel.stop()
