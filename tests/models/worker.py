"""What pool processes run for the model tests. Imports megatron-core."""

import os
import socket
from types import SimpleNamespace
from unittest import mock

import numpy
import torch
from megatron.core import parallel_state as groups

from mindspeed_llm import device
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.models import gpt, parallel
from mindspeed_llm.models.causal_lm import CausalLM
from mindspeed_llm.models.config import ModelConfig
from tests.distributed.cases import Case
from tests.distributed.worker import engine_options, start


def connect_to_a_taken_port(rank: int) -> str:
    """The message of a job whose rendezvous port another program holds; in a process without a group."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with mock.patch.dict(os.environ, MASTER_PORT=str(other.getsockname()[1])):
            try:
                parallel.connect(device.select("cpu"))
            except InputError as error:
                return str(error)
    return "connected"


def connect_alone(rank: int) -> tuple[int, bool]:
    """(processes, whether a group is left) of a program started without a launcher."""
    with mock.patch.dict(os.environ):
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        parallel.connect(device.select("cpu"))
    world = torch.distributed.get_world_size()
    parallel.disconnect()
    return world, torch.distributed.is_initialized()


def start_message(rank: int, tensor: int, pipeline: int) -> str:
    """What a layout that does not fit the processes is refused with."""
    try:
        parallel.start(device.select("cpu"), tensor, pipeline)
    except UsageError as error:
        return str(error)
    parallel.stop()
    return "started"


def masked(rank: int, tensor: int, logits: numpy.ndarray, vocabulary: int) -> numpy.ndarray:
    """This TP rank's block of the logits with the padding rows of the vocabulary masked."""
    parallel.start(device.select("cpu"), tensor)
    try:
        group = groups.get_tensor_model_parallel_group()
        model = mock.Mock(vocabulary=vocabulary, pg_collection=mock.Mock(tp=group))
        return CausalLM.mask_padding_rows(model, torch.from_numpy(logits).chunk(tensor, -1)[group.rank()]).numpy()
    finally:
        parallel.stop()


def chunk_facts(rank: int, case: Case, model: ModelConfig) -> list[SimpleNamespace]:
    """Every chunk's place, its parameters' shapes, and which of them are marked split over TP."""
    start(case)
    try:
        chunks = gpt.build_chunks(model, engine_options(case), device.select("cpu"))
        return [
            SimpleNamespace(
                first_layer=chunk.first_layer,
                layers=len(chunk.decoder.layers),
                shapes={name: tuple(p.shape) for name, p in chunk.named_parameters()},
                split={n for n, p in chunk.named_parameters() if getattr(p, "tensor_model_parallel", False)},
                partial={n for n, p in chunk.named_parameters() if getattr(p, "sequence_parallel", False)},
            )
            for chunk in chunks
        ]
    finally:
        parallel.stop()
