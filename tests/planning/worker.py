"""In the processes of a pool: one step of a job under the tracker."""

from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state as groups
from torch.utils.flop_counter import FlopCounterMode

from mindspeed_llm import device
from mindspeed_llm.arguments.optimizer import OptimizerOptions
from mindspeed_llm.device import native
from mindspeed_llm.lora.inject import give_recompute_a_gradient, inject
from mindspeed_llm.models import gpt, parallel
from mindspeed_llm.models.packed import packed_rows
from mindspeed_llm.planning.job import Job
from mindspeed_llm.planning.tracker import LiveMemory
from mindspeed_llm.training.engine import Engine, create_engine, train_step
from mindspeed_llm.training.live_tensors import tensors_by_class
from mindspeed_llm.training.preference import Preference
from tests.distributed.collectives import Collectives


def options_of(job: Job) -> gpt.EngineOptions:
    """The job in the engine's words."""
    return gpt.EngineOptions(
        tensor=job.layout.tp,
        pipeline=job.layout.pp,
        context=job.context,
        expert=job.layout.ep,
        expert_tensor=job.layout.etp if job.model.num_experts else None,
        layers_per_virtual_stage=job.layout.layers_per_virtual_stage,
        sequence_parallel=job.sequence_parallel,
        dtype=gpt.DTYPES[job.dtype],
        variable_seq_lengths=False,
        grouped_experts=not job.experts_apart,
        recompute_granularity=job.recompute,
        recompute_method=job.recompute_method,
        recompute_num_layers=job.recompute_layers,
    )


def build(job: Job) -> Engine:
    """The job's engine with small random weights."""
    chosen = device.select("cpu")
    layout = job.layout
    virtual = layout.vp if layout.vp > 1 else None
    experts = {"expert": layout.ep, "expert_tensor": layout.etp if job.model.num_experts else None}
    parallel.start(chosen, layout.tp, layout.pp, virtual, context=job.context, **experts)
    chunks = gpt.build_chunks(job.model, options_of(job), chosen)
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.uniform_(parameter, -0.05, 0.05)
    if job.lora is not None:
        inject(chunks, job.lora, job.fused, 1, job.fused_mlp)
        if job.recompute == "full":
            give_recompute_a_gradient(chunks)
    preference = Preference() if job.pairs else None
    overlap = False, job.overlap_param_gather
    return create_engine(chunks, OptimizerOptions(lr=1e-4), job.distributed_optimizer, *overlap, preference=preference)


def batches(job: Job) -> list[dict[str, torch.Tensor]]:
    """The micro-batches of a step; the first positions of a row have no label."""
    made = []
    for number in range(job.micro_batches):
        draw = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, job.model.vocab_size, (job.micro_batch, job.length), generator=draw)
        labels = tokens.roll(-1, 1)
        labels[:, : round(job.length * (1 - job.trained))] = -100
        made.append({"tokens": tokens, "labels": labels})
        if job.rows is not None:
            made[-1] = laid_out_flat(job, tokens.flatten(), labels.flatten())
        if job.pairs:
            numbers = torch.arange(job.micro_batch)[:, None].expand(tokens.shape).contiguous()
            made[-1] |= {"pairs": job.micro_batch // 2, "sequences": numbers}
    return made


def laid_out_flat(job: Job, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """The tokens of a micro-batch as rows one behind the other in one sequence."""
    lengths = [len(one) for one in tokens.split(job.rows)]
    place = groups.get_context_parallel_rank(), groups.get_context_parallel_world_size()
    packed = packed_rows(lengths, lengths, torch.device("cpu"), place)
    padding = torch.zeros(1, len(tokens), dtype=torch.bool)
    return {"tokens": tokens[None], "labels": labels[None], "padding": padding, "packed": packed}


def process_groups() -> list[tuple[str, Any]]:
    """Short names of the groups a step talks in."""
    found = [
        ("tensor", groups.get_tensor_model_parallel_group()),
        ("pipeline", groups.get_pipeline_model_parallel_group()),
        ("context", groups.get_context_parallel_group()),
        ("data", groups.get_data_parallel_group()),
        ("data", groups.get_data_parallel_group(with_context_parallel=True)),
        ("expert", groups.get_expert_model_parallel_group()),
    ]
    if groups.get_pipeline_model_parallel_world_size() == 2:  # megatron-core sends one direction over all processes
        found.append(("pipeline", torch.distributed.group.WORLD))
    return [(name, group) for name, group in found if group.size() > 1]


def sent_bytes(collectives: Collectives, sizes: dict[str, int]) -> dict[str, float]:
    """Group -> bytes this rank sent, by the cost of each kind on a ring; messages to neighbours count whole."""
    sent: dict[str, float] = {}
    for (kind, group, nbytes), number in collectives.seen.items():
        if group not in sizes or kind == "recv":
            continue
        ring = (sizes[group] - 1) / sizes[group]
        factor = {"all_reduce": 2 * ring, "send": 1.0}.get(kind, ring)
        sent[group] = sent.get(group, 0.0) + factor * nbytes * number
    return sent


def measure(rank: int, job: Job, tracker: type[LiveMemory] = LiveMemory) -> dict[str, Any]:
    """Peaks and bytes sent of the second step (the first one makes the optimizer's state), operations of the third."""
    try:
        engine = build(job)
        few = job.layout.pp  # micro-batches: as many as a pipeline needs; all are alike
        train_step(engine, batches(job)[:few])
        named = process_groups()
        with tracker(tensors_by_class(engine)) as seen, Collectives(named) as collectives:
            train_step(engine, batches(job))
        plain = mock.patch.object(native, "serves", lambda *tensors: False)  # the counter sees torch's operations
        with plain, FlopCounterMode(display=False) as counted:
            train_step(engine, batches(job)[:few])
        for chunk in engine.wrapped:
            chunk.grad_accs.clear()  # a cycle through torch's graph, which Python's collector cannot see
        return {
            "stage": groups.get_pipeline_model_parallel_rank(),
            "peak": {**seen.peak, "total": seen.total},
            "sent": sent_bytes(collectives, {name: group.size() for name, group in named}),
            "flops": counted.get_total_flops() * job.micro_batches // few,
        }
    finally:
        parallel.stop()
