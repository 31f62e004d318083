"""Our side of the parity tests: a saved folder, live on megatron-core. Imports megatron-core."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from megatron.core import parallel_state

from mindspeed_llm import device
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.live import live_tensors, load_live
from mindspeed_llm.inference.live import LiveModel
from mindspeed_llm.models import families, parallel
from mindspeed_llm.models.causal_lm import IGNORE, CausalLM
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.gpt import EngineOptions, build_chunks
from mindspeed_llm.models.packed import packed_rows


@contextmanager
def live(folder: Path, **engine: Any) -> Iterator[tuple[CausalLM, ModelConfig]]:
    """The model of an HF folder with its weights, for evaluation; the process groups end with the block."""
    chosen, options = device.select("cpu"), EngineOptions(**engine)
    parallel.start(chosen, options.tensor, options.pipeline)
    try:
        source = HFSource(folder)
        (chunk,) = build_chunks(source.config, options, chosen)
        rank = parallel_state.get_tensor_model_parallel_rank()
        load_live(live_tensors(chunk), source, rank, options.tensor, chunk.first_layer)
        chunk.eval()
        yield chunk, source.config
    finally:
        parallel.stop()


@torch.no_grad()
def logits(rank: int, folder: Path, tokens: numpy.ndarray, **engine: Any) -> numpy.ndarray:
    """Logits [rows, length, vocabulary] of whole rows."""
    with live(folder, **engine) as (chunk, model):
        found = chunk(torch.from_numpy(tokens), None, None, runtime_gather_output=True)
        return found[..., : model.vocab_size].numpy()


@torch.no_grad()
def packed_logits(
    rank: int, folder: Path, tokens: numpy.ndarray, lengths: Sequence[int], counted: Sequence[int]
) -> numpy.ndarray:
    """Logits [sum of lengths, vocabulary] of rows one behind the other.

    Args:
        tokens: [1, sum of lengths].
        lengths: tokens that see each other.
        counted: tokens whose positions are counted together.
    """
    with live(folder) as (chunk, model):
        packed = packed_rows(lengths, counted, torch.device("cpu"))
        found = chunk(torch.from_numpy(tokens), None, None, packed_seq_params=packed, runtime_gather_output=True)
        return found[0, :, : model.vocab_size].numpy()


def logits_bf16(rank: int, folder: Path, tokens: numpy.ndarray) -> numpy.ndarray:
    """The same with parameters and activations in bfloat16, as fp32 numbers."""
    with torch.no_grad(), live(folder, dtype=torch.bfloat16) as (chunk, model):
        found = chunk(torch.from_numpy(tokens), None, None, runtime_gather_output=True)
        return found[..., : model.vocab_size].float().numpy()


def logits_of_a_new_family(rank: int, folder: Path, tokens: numpy.ndarray, page: Path, family: str) -> numpy.ndarray:
    """The same with a family page that is not in the registry: the object `family` of the file `page`."""
    spec = importlib.util.spec_from_file_location(page.stem, page)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with mock.patch.object(families, "FAMILIES", (*families.FAMILIES, getattr(module, family))):
        return logits(rank, folder, tokens)


def cached_logits(
    rank: int, folder: Path, tokens: numpy.ndarray, cuts: Sequence[int], swap_at: int = 0, **engine: Any
) -> list[Any]:
    """Logits [rows, vocabulary] behind each piece of the rows, which are given to a cache piece by piece.

    Args:
        cuts: where pieces end.
        swap_at: the piece before which the cache's rows are put in the opposite order (as beams are); 0 for never.
    """
    with live(folder, **engine) as (chunk, model):
        running = LiveModel(chunk, model, torch.device("cpu"))
        cache, found = running.cache(*tokens.shape), []
        for piece, (start, stop) in enumerate(zip((0, *cuts), (*cuts, tokens.shape[1]), strict=True)):
            if swap_at and piece == swap_at:
                cache.swap_key_value_dict(range(len(tokens))[::-1])
                tokens = tokens[::-1].copy()
            logits = running.next_logits(torch.from_numpy(tokens[:, start:stop]), cache).numpy()
            found.append(logits[::-1] if swap_at and piece >= swap_at else logits)
        return found


def losses_and_gradients(
    rank: int, folder: Path, tokens: numpy.ndarray, frozen: Sequence[str] = (), **engine: Any
) -> tuple[numpy.ndarray, dict[str, numpy.ndarray]]:
    """Loss of each next token, in the order [position, row], and the gradient of its mean for each parameter.

    Args:
        frozen: parameters that need no gradient.
    """
    with live(folder, **engine) as (chunk, _):
        chunk.train()
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(name not in frozen)
        rows = torch.from_numpy(tokens)
        labels = torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], IGNORE)], 1)
        found = chunk(rows, None, None, labels=labels)
        found.mean().backward()
        grads = {name: p.grad.numpy().copy() for name, p in chunk.named_parameters() if p.grad is not None}
        return found.detach().numpy(), grads
