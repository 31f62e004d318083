"""What pool processes run for the tests of attention in chunks of the batch. Imports megatron-core."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy
import torch
from megatron.core import parallel_state

from mindspeed_llm import device
from mindspeed_llm.arguments.optimizer import OptimizerOptions
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.lora import fused_attention, overlap
from mindspeed_llm.lora.fused_attention import AdaptedAttention, Flight
from mindspeed_llm.lora.inject import attentions, give_recompute_a_gradient, inject
from mindspeed_llm.lora.layers import lora_layers
from mindspeed_llm.models import parallel
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.gpt import DTYPES, EngineOptions, build_chunks
from mindspeed_llm.training.engine import create_engine, finish_parameter_sync, run_microbatches, train_step

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
Kept = dict[str, numpy.ndarray]


@dataclass(frozen=True)
class Form:
    """One way to compute the same gradients over two ranks.

    Attributes:
        chunks: cut wherever it can be; else tensors of this size stay whole.
        fault: what is broken on purpose.
    """

    sequence_parallel: bool = False
    fused: bool = True
    chunks: bool = True
    recompute: bool = False
    dtype: str = "float32"
    sequences: int = 3
    dropout: float = 0.0
    fault: str | None = None


def swapped(self: Flight, chunk: int) -> torch.Tensor:
    """Another chunk's sums: the fault that the tests have to see."""
    pending, sums, _ = self.sent.pop(max(self.sent) if chunk == min(self.sent) else min(self.sent))
    pending.wait()
    return sums


class Trace:
    """Order of issues and waits of the attention's own messages."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.own: list[overlap.Pending] = []
        self.sent: dict[str, int] = {}  # bytes of the undivided tensors by kind

    def issued(self, function: Any) -> Any:
        """A collective that is noted."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.events.append("issue")
            whole = max(one.nbytes for one in args if isinstance(one, torch.Tensor))
            self.sent[function.__name__] = self.sent.get(function.__name__, 0) + whole
            self.own.append(function(*args, **kwargs))
            return self.own[-1]

        return noted

    def waited(self, pending: Any) -> None:
        """A wait that is noted."""
        if pending.work is not None:
            self.events += ["wait"] if pending in self.own else []
            pending.work.wait()
            pending.work = None


def gradients(rank: int, form: Form, model: ModelConfig) -> SimpleNamespace:
    """Loss and every gradient of one micro-batch of sequences of unequal content, and what was communicated when."""
    parallel.start(device.select("cpu"), 2)
    try:
        chunks = build(form, model)
        engine = create_engine(chunks, OptimizerOptions())
        return measured(engine, form)
    finally:
        parallel.stop()


def trained(rank: int, form: Form, model: ModelConfig, steps: int) -> SimpleNamespace:
    """The adapters after some steps over two replicas, their parameters gathered while the forward pass runs.

    Also how often an attention read factors that were still on their way.
    """
    parallel.start(device.select("cpu"), 2)
    try:
        chunks = build(form, model)
        engine = create_engine(chunks, OptimizerOptions(lr=1e-2, adam_eps=1e-2), True, True, True)
        if form.fault == "unhooked":
            for attention in attentions(chunks[0]):
                attention._forward_pre_hooks.clear()
        groups, late, call = engine.wrapped[0].param_to_bucket_group, [], AdaptedAttention.__call__

        def watched(self: AdaptedAttention, *args: Any) -> Any:
            used = {groups[p] for one in (self.qkv, self.proj) for p in one.parameters() if p in groups}
            late.append(not all(one.param_gather_dispatched and one.param_gather_handle is None for one in used))
            return call(self, *args)

        with mock.patch.object(AdaptedAttention, "__call__", watched):
            for number in range(steps):
                train_step(engine, [rows(form, 10 * number + parallel_state.get_data_parallel_rank())])
        finish_parameter_sync(engine)
        named = chunks[0].named_parameters()
        kept = {name: parameter.detach().numpy().copy() for name, parameter in named if parameter.requires_grad}
        for chunk in engine.wrapped:
            chunk.grad_accs.clear()  # a cycle through torch's graph, which Python's collector cannot see
        return SimpleNamespace(adapters=kept, late=sum(late), calls=len(late))
    finally:
        parallel.stop()


def build(form: Form, model: ModelConfig) -> list[Any]:
    """The adapted chunk with all its parameters drawn."""
    recompute: dict[str, Any] = {}
    if form.recompute:
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    dtype = DTYPES[form.dtype]
    options = EngineOptions(tensor=2, sequence_parallel=form.sequence_parallel, dtype=dtype, **recompute)
    chunks = build_chunks(model, options, device.select("cpu"))
    inject(chunks, LoraSettings(3, 7.0, TARGETS, form.dropout), form.fused, 1)
    if form.recompute:
        give_recompute_a_gradient(chunks)
    fill(chunks[0], parallel_state.get_tensor_model_parallel_rank())
    for layer in lora_layers(chunks[0]) if form.chunks else ():
        layer.chunk_bytes = 1
    return chunks


def rows(form: Form, seed: int) -> dict[str, torch.Tensor]:
    """A micro-batch."""
    tokens = torch.randint(0, 64, (form.sequences, 10), generator=torch.Generator().manual_seed(seed))
    return {"tokens": tokens, "labels": torch.cat([tokens[:, 1:], torch.full((form.sequences, 1), -100)], 1)}


def fill(chunk: torch.nn.Module, rank: int) -> None:
    """All parameters drawn anew: what both ranks hold alike, what is split by rank."""
    for number, (name, parameter) in enumerate(sorted(chunk.named_parameters())):
        split = getattr(parameter, "tensor_model_parallel", False)
        generator = torch.Generator().manual_seed(100 * number + (rank if split else 0))
        drawn = torch.randn(parameter.shape, generator=generator) * 0.2
        with torch.no_grad():
            parameter.copy_(drawn + 1 if "norm" in name else drawn)


def measured(engine: Any, form: Form) -> SimpleNamespace:
    """One step's gradients."""
    trace = Trace()
    with mock.patch.object(overlap.Pending, "wait", lambda pending: trace.waited(pending)):
        names = ("all_reduce", "reduce_scatter", "all_gather")
        patches = [mock.patch.object(fused_attention, n, trace.issued(getattr(fused_attention, n))) for n in names]
        if form.fault == "swapped":
            patches.append(mock.patch.object(Flight, "receive", swapped))
        for patch in patches:
            patch.start()
        torch.manual_seed(0)
        told = run_microbatches(engine, [rows(form, 4)], forward_only=False)
        for patch in patches:
            patch.stop()
    grads: Kept = {
        name: parameter.main_grad.float().numpy().copy()
        for name, parameter in engine.chunks[0].named_parameters()
        if parameter.requires_grad
    }
    whole = [attention.whole is not None for attention in attentions(engine.chunks[0])]
    return SimpleNamespace(loss=told.loss, gradients=grads, events=trace.events, sent=trace.sent, whole=whole)
