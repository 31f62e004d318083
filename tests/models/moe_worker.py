"""What pool processes run for models with experts: our live model, loaded from an HF folder. Imports megatron-core."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from megatron.core import parallel_state

from mindspeed_llm import device
from mindspeed_llm.checkpoint.layout import ExpertShare
from mindspeed_llm.checkpoint.live import live_tensors, load_live
from mindspeed_llm.checkpoint.open import open_base
from mindspeed_llm.inference.live import LiveModel
from mindspeed_llm.models import gpt, parallel
from mindspeed_llm.models.causal_lm import CausalLM


def live_model(folder: Path, engine: gpt.EngineOptions) -> CausalLM:
    """This rank's loaded model; the groups exist."""
    base = open_base(folder)
    (chunk,) = gpt.build_chunks(base.config, engine, device.select("cpu"))
    rank = parallel_state.get_tensor_model_parallel_rank()
    experts = ExpertShare(*parallel.expert_place(base.config.num_experts))
    load_live(live_tensors(chunk), base, rank, engine.tensor, chunk.first_layer, experts=experts)
    return chunk.eval()


@contextmanager
def groups(engine: gpt.EngineOptions) -> Iterator[None]:
    """megatron-core's groups for a layout, as long as they are used."""
    chosen = device.select("cpu")
    parallel.start(chosen, engine.tensor, engine.pipeline, expert=engine.expert, expert_tensor=engine.expert_tensor)
    try:
        yield
    finally:
        parallel.stop()


@torch.no_grad()
def logits(rank: int, folder: Path, ids: numpy.ndarray, **layout: int | bool) -> tuple[int, numpy.ndarray]:
    """(data-parallel rank, logits [rows, length, vocabulary] of its rows) in a layout (fields of `EngineOptions`).

    Rows are dealt out to the data-parallel ranks in turn, so that they send different numbers of tokens to experts.
    """
    engine = gpt.EngineOptions(**layout)
    with groups(engine):
        model = live_model(folder, engine)
        place, places = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        out = model(torch.from_numpy(ids[place::places]), None, None, runtime_gather_output=True)
        return place, out[..., : model.vocabulary].numpy().copy()


def cached_logits(rank: int, folder: Path, ids: numpy.ndarray, prompt: int, **layout: int) -> numpy.ndarray:
    """Logits [rows, length - prompt + 1, vocabulary] behind the prompt and behind each token after it, from a cache."""
    engine = gpt.EngineOptions(**layout)
    with groups(engine):
        chunk = live_model(folder, engine)
        model = LiveModel(chunk, open_base(folder).config, torch.device("cpu"))
        cache = model.cache(*ids.shape)
        steps = [ids[:, :prompt], *numpy.split(ids[:, prompt:], ids.shape[1] - prompt, axis=1)]
        return numpy.stack([model.next_logits(torch.from_numpy(step), cache).numpy() for step in steps], axis=1)
