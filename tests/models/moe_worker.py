"""What pool processes run for models with experts: our live model, loaded from an HF folder. Imports megatron-core."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from megatron.core import parallel_state

from mindspeed_llm import device
from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.programs import InferenceOptions
from mindspeed_llm.checkpoint.layout import ExpertShare
from mindspeed_llm.checkpoint.live import live_tensors, load_live
from mindspeed_llm.checkpoint.open import open_base
from mindspeed_llm.device import gloo
from mindspeed_llm.errors import UsageError
from mindspeed_llm.inference.live import LiveModel, load_model, open_sources
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


@torch.no_grad()
def without_effect(rank: int, folder: Path, ids: numpy.ndarray) -> list[str]:
    """Names of the live model's tensors whose values, moved by one place, leave the logits as they were."""
    with groups(gpt.EngineOptions()):
        model, tokens = live_model(folder, gpt.EngineOptions()), torch.from_numpy(ids)
        before = model(tokens, None, None)
        found = []
        for name, tensor in live_tensors(model).items():
            kept = tensor.clone()
            tensor.copy_(kept.roll(1))
            if float((model(tokens, None, None) - before).abs().max()) < 1e-3:
                found.append(name)
            tensor.copy_(kept)
        return found


def types(rank: int, folder: Path) -> dict[str, str]:
    """The type of every tensor of a bf16 live model."""
    engine = gpt.EngineOptions(dtype=torch.bfloat16)
    with groups(engine):
        return {name: str(tensor.dtype) for name, tensor in live_tensors(live_model(folder, engine)).items()}


def balance(rank: int, folder: Path, hidden: numpy.ndarray, coefficient: float, training: bool) -> numpy.ndarray:
    """The gradient that a router's weight gets from the auxiliary loss alone."""
    engine = gpt.EngineOptions(moe_aux_loss=coefficient)
    with groups(engine):
        router = live_model(folder, engine).train(training).decoder.layers[0].mlp.router
        router.set_layer_number(1)
        probs, _ = router(torch.from_numpy(hidden))
        (probs * 0).sum().backward()
        return router.weight.grad.numpy().copy()


def place_message(rank: int, experts: int, expert: int) -> str:
    """What a number of experts that does not divide is refused with."""
    with groups(gpt.EngineOptions(expert=expert)):
        try:
            return str(parallel.expert_place(experts))
        except UsageError as error:
            return str(error)


def start_message(rank: int, expert: int, expert_tensor: int) -> str:
    """What a layout of experts that does not fit the processes is refused with."""
    try:
        parallel.start(device.select("cpu"), expert=expert, expert_tensor=expert_tensor)
    except UsageError as error:
        return str(error)
    parallel.stop()
    return "started"


def gathered(rank: int, lengths: list[int]) -> list[list[float]]:
    """What ranks with so many numbers each, all of them the rank's own, gather."""
    own = torch.full((lengths[rank], 2), float(rank))
    found = [torch.empty(length, 2) for length in lengths]
    gloo.all_gather(found, own)
    return [one[:, 0].tolist() for one in found]


def program_logits(rank: int, argv: list[str], ids: numpy.ndarray) -> numpy.ndarray:
    """Logits [rows, vocabulary] behind each row, of the model an inference.py command line opens."""
    options = parse(InferenceOptions, argv, "inference.py")
    model = load_model(options, open_sources(options), device.select("cpu"))
    try:
        return model.next_logits(torch.from_numpy(ids), None).numpy()
    finally:
        parallel.stop()
