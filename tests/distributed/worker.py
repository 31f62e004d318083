"""What the processes of a pool run: one layout, built, measured, trained and reported. Imports megatron-core."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from megatron.core import parallel_state as groups
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mindspeed_llm import device
from mindspeed_llm.arguments.optimizer import OptimizerOptions
from mindspeed_llm.checkpoint.formats.lazy import narrow
from mindspeed_llm.checkpoint.layout import ExpertShare
from mindspeed_llm.checkpoint.live import live_tensors, load_live, local_slice
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.checkpoint.open import open_base
from mindspeed_llm.checkpoint.tables import WeightTable, logical_name
from mindspeed_llm.lora import fused, overlap
from mindspeed_llm.lora.inject import give_recompute_a_gradient, inject
from mindspeed_llm.models import gpt, parallel
from mindspeed_llm.models.causal_lm import IGNORE, CausalLM
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.training import engine as engine_module
from mindspeed_llm.training import pipeline
from mindspeed_llm.training.engine import (
    Engine,
    create_engine,
    finish_parameter_sync,
    run_microbatches,
    to_device,
    train_step,
)
from mindspeed_llm.training.optimizer_state import export_gradients, export_state, import_state
from mindspeed_llm.training.schedule import Schedule
from tests.distributed import expert_faults
from tests.distributed.cases import CLIP, EPSILON, LEARNING_RATE, SIZES, STEPS, WEIGHT_DECAY, Arrays, Case
from tests.distributed.collectives import Collectives
from tests.distributed.packing_faults import PACKING_FAULTS
from tests.distributed.worker_result import FIELDS, Continued, OptimizerState, Result

OPTIONS = OptimizerOptions(
    lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, clip_grad=CLIP, adam_eps=EPSILON, lr_decay_style="constant"
)
RECOMPUTE = {
    None: {},
    "selective": {"recompute_granularity": "selective"},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


class Factors:
    """LoRA factors in memory as the package reads them from a checkpoint (`TensorSource`)."""

    path = "memory"

    def __init__(self, config: ModelConfig, values: Arrays) -> None:
        self.config, self.table = config, WeightTable(config)
        self.values = {name: torch.from_numpy(value) for name, value in values.items()}

    def names(self) -> list[str]:
        return list(self.values)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.values[name].dtype

    def read(self, name: str, rows: Any = None, columns: Any = None) -> Tensor:
        return narrow(self.values[name], rows, columns)


def forget_sequence_parallel_mark(chunk: CausalLM) -> None:
    """Planted fault: the replicated factors are not known to see local tokens only."""
    for parameter in chunk.parameters():
        if parameter.requires_grad:
            parameter.sequence_parallel = False


def forget_the_mark_of_lookups(chunk: CausalLM) -> None:
    """Planted fault: the same of adapters of routers and token embeddings alone."""
    for name, parameter in chunk.named_parameters():
        if parameter.requires_grad and ("router" in name or "word_embeddings" in name):
            parameter.sequence_parallel = False


def swap_gate_and_up(chunk: CausalLM) -> None:
    """Planted fault: up where gate belongs, in the loaded base weights."""
    for name, parameter in chunk.named_parameters():
        if "linear_fc1" in name and "lora" not in name:
            parameter.data.copy_(torch.cat(parameter.data.chunk(2)[::-1]))


def nothing_pending(x: Tensor, group: Any, hidden: bool) -> overlap.Pending:
    """Planted fault: the sum over ranks is skipped."""
    return overlap.Pending(None)


def slice_pending(out: Tensor, x: Tensor, group: Any, hidden: bool) -> overlap.Pending:
    """Planted fault: each rank keeps its slice of its own partial sums."""
    out.copy_(x.chunk(group.size())[group.rank()])
    return overlap.Pending(None)


CHUNK_FAULTS: dict[str, Callable[[CausalLM], None]] = {
    **expert_faults.CHUNK,
    "no-sequence-parallel-mark": forget_sequence_parallel_mark,
    "lookups-without-mark": forget_the_mark_of_lookups,
    "gate-and-up-swapped": swap_gate_and_up,
}
FUSED_FAULTS = {
    "all-reduce-skipped": ("all_reduce", nothing_pending),
    "reduce-scatter-skipped": ("reduce_scatter", slice_pending),
}
BACKWARD_FAULT = "backward-sum-skipped"
SYNC_FAULT = "gradient-sync-skipped"


def backward_without_sums(ctx: Any, grad: Tensor) -> Any:
    """Planted fault: the fused backward pass leaves its sums partial."""
    with mock.patch.multiple(overlap, all_reduce=nothing_pending, reduce_scatter=slice_pending):
        return BACKWARD(ctx, grad)


BACKWARD = fused._LoraLinear.backward


def start(case: Case) -> device.Device:
    """megatron-core's groups for the case."""
    chosen = device.select("cpu")
    virtual = engine_options(case).virtual_stages(SIZES.layers)
    experts = {"expert": case.expert, "expert_tensor": case.expert_tensor}
    parallel.start(chosen, case.tensor, case.pipeline, virtual, context=case.context, **experts)
    return chosen


def engine_options(case: Case) -> gpt.EngineOptions:
    """The case as the package names it."""
    return gpt.EngineOptions(
        tensor=case.tensor,
        pipeline=case.pipeline,
        layers_per_virtual_stage=case.virtual_layers,
        sequence_parallel=case.sequence_parallel,
        dtype=gpt.DTYPES[case.dtype],
        variable_seq_lengths=case.ragged,
        calculate_per_token_loss=case.per_token,
        context=case.context,
        expert=case.expert,
        expert_tensor=case.expert_tensor,
        moe_aux_loss=case.balance,
        moe_aux_loss_type="seq_aux_loss" if case.balance_rows else "aux_loss",
        moe_z_loss=case.z_loss or None,
        grouped_experts=not case.apart,
        **RECOMPUTE[case.recompute],
    )


def build(case: Case, folder: Path, adapter: Arrays) -> Engine:
    """The loaded engine of this rank, with the case's fault in it."""
    base = open_base(folder)
    chunks = gpt.build_chunks(base.config, engine_options(case), device.select("cpu"))
    rank = groups.get_tensor_model_parallel_rank()
    experts = ExpertShare(*parallel.expert_place(base.config.num_experts))
    for chunk in chunks:
        load_live(live_tensors(chunk), base, rank, case.tensor, chunk.first_layer, experts=experts)
    if case.lora:
        targets = sorted({name.removesuffix(".lora_A.weight").rpartition(".")[2] for name in adapter if "_A" in name})
        saved = ("router",) if case.routers else ()
        settings = LoraSettings(SIZES.rank, SIZES.alpha, tuple(targets), modules_to_save=saved)
        inject(chunks, settings, case.fused, 1, case.fused_mlp)
        if case.recompute in ("full", "block") and case.fault != "embedding-without-gradient":
            give_recompute_a_gradient(chunks)
        source = Factors(base.config, adapter)
        for chunk in chunks:
            load_live(live_tensors(chunk), source, rank, case.tensor, chunk.first_layer, experts=experts)
    if case.fault in CHUNK_FAULTS:
        for chunk in chunks:
            CHUNK_FAULTS[case.fault](chunk)
    return create_engine(chunks, OPTIONS, case.distributed_optimizer, case.overlap, case.overlap)


@contextmanager
def live(case: Case, folder: Path, adapter: Arrays) -> Iterator[Engine]:
    """The case's engine, and its groups for as long as it is used."""
    start(case)
    try:
        engine = build(case, folder, adapter)
        yield engine
        for chunk in engine.wrapped:
            chunk.grad_accs.clear()  # a cycle through torch's graph, which Python's collector cannot see
    finally:
        parallel.stop()


def logical(engine: Engine, trainable: bool | None = None) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by logical name; all, or only the trainable or the frozen ones."""
    first = parallel.expert_place(engine.config.num_moe_experts or 0)[0]
    return {
        logical_name(name, chunk.first_layer, first_expert=first): parameter
        for chunk in engine.chunks
        for name, parameter in chunk.named_parameters()
        if trainable is None or parameter.requires_grad == trainable
    }


def share(step: Sequence[Mapping[str, numpy.ndarray]]) -> list[dict[str, Tensor]]:
    """This DP rank's micro-batches: every D-th."""
    mine = step[groups.get_data_parallel_rank() :: groups.get_data_parallel_world_size()]
    found = []
    for batch in mine:
        real = torch.from_numpy(batch["real"])
        found.append({**to_device(batch, torch.device("cpu")), "real": real, "padding": ~real})
    return found


def real_logits(engine: Engine, batches: Sequence[dict[str, Tensor]]) -> list[numpy.ndarray]:
    """Logits [m, v] of every micro-batch's real positions, on the last stage; through the pipeline's own schedule."""

    def step(iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        tokens, real = pipeline.own(batch, "tokens", "real")
        labels = torch.where(real, 0, IGNORE)
        out = model(tokens, None, None, labels=labels, packed_seq_params=batch.get("packed"))
        return out, lambda out, **kwargs: out

    models = engine.wrapped
    for chunk in engine.chunks:
        chunk.answers_logits = True
    rows, length = batches[0]["tokens"].shape
    found = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in models] if len(models) > 1 else iter(batches),
        model=models if len(models) > 1 else models[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
    )
    for chunk in engine.chunks:
        chunk.answers_logits = False
    return [logits.float().numpy() for logits in found]


def process_groups() -> list[tuple[str, Any]]:
    """Short names of the groups a step may talk in; megatron-core has two data-parallel ones of the same ranks."""
    return [
        ("world", torch.distributed.group.WORLD),
        ("tp", groups.get_tensor_model_parallel_group()),
        ("pp", groups.get_pipeline_model_parallel_group()),
        ("dp", groups.get_data_parallel_group()),
        ("dp", groups.get_data_parallel_group(with_context_parallel=True)),
    ]


def arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    """Copies that outlive this task."""
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def train(rank: int, case: Case, folder: Path, adapter: Arrays, steps: Sequence[Any]) -> Result:
    """Build the case's layout with its fault, measure its first global batch, train on all of them."""
    with ExitStack() as stack:
        if case.fault in FUSED_FAULTS:
            stack.enter_context(mock.patch.object(overlap, *FUSED_FAULTS[case.fault]))
        if case.fault in expert_faults.PATCHES:
            stack.enter_context(mock.patch.object(*expert_faults.PATCHES[case.fault]))
        if case.fault in PACKING_FAULTS:
            stack.enter_context(mock.patch.object(engine_module, "packed_rows", PACKING_FAULTS[case.fault]))
        if case.fault == BACKWARD_FAULT:
            stack.enter_context(mock.patch.object(fused._LoraLinear, "backward", staticmethod(backward_without_sums)))
        engine = stack.enter_context(live(case, folder, adapter))
        if case.fault == SYNC_FAULT:
            for chunk in engine.wrapped:
                chunk.finish_grad_sync = lambda **kwargs: None
        return measure(engine, steps)


def measure(engine: Engine, steps: Sequence[Any]) -> Result:
    """Logits, gradients and collectives of the first global batch, then every step's loss and what it changed."""
    result = Result(
        groups.get_tensor_model_parallel_rank(),
        groups.get_pipeline_model_parallel_rank(),
        groups.get_data_parallel_rank(),
        groups.get_context_parallel_rank(),
        groups.get_expert_tensor_parallel_rank(),
    )
    parameters = {id(p): p for chunk in engine.chunks for p in chunk.parameters()}
    result.parameter_bytes = sum(p.nbytes for p in parameters.values())
    frozen = {name: p.detach().clone() for name, p in logical(engine, trainable=False).items()}
    with torch.no_grad():
        result.logits = real_logits(engine, share(steps[0]))
    for chunk in engine.wrapped:
        chunk.zero_grad_buffer()
    with Collectives(process_groups()) as counted:
        run_microbatches(engine, share(steps[0]), forward_only=False)
    result.collectives = counted.seen
    result.gradients = arrays(export_gradients(engine.optimizer, logical(engine, trainable=True)))
    schedule = Schedule(engine.optimizer, OPTIONS, len(steps))
    for number, step in enumerate(steps, 1):
        schedule.set(number)
        done = train_step(engine, share(step))
        result.losses.append(done.loss)
        result.norms.append(done.grad_norm)
        result.tokens.append(done.tokens)
    finish_parameter_sync(engine)
    result.trained = arrays(logical(engine, trainable=True))
    now = logical(engine, trainable=False)
    result.frozen_changed = [name for name, before in frozen.items() if not torch.equal(before, now[name])]
    return result


def train_on(
    rank: int, case: Case, folder: Path, adapter: Arrays, steps: Sequence[Any], state: OptimizerState | None
) -> Continued:
    """Train at the case's layout from an optimizer state of whole tensors (None: from the start), and export it."""
    with live(case, folder, adapter) as engine:
        if state is not None:
            take(engine, case, folder, state)
        schedule = Schedule(engine.optimizer, OPTIONS, STEPS)
        losses = []
        for number, step in enumerate(steps, 1):
            schedule.set(number)
            losses.append(train_step(engine, share(step)).loss)
        exported, count = export_state(engine.optimizer, logical(engine, trainable=True))
        by_field = {f: {name: fields[f].numpy() for name, fields in exported.items()} for f in FIELDS}
        place = groups.get_tensor_model_parallel_rank(), groups.get_pipeline_model_parallel_rank()
        trained = {name: p.float() for name, p in logical(engine, trainable=True).items()}
        return Continued(*place, losses, by_field, count, arrays(trained))


def take(engine: Engine, case: Case, folder: Path, state: OptimizerState) -> None:
    """Import this rank's shares of a whole optimizer state."""
    table, rank = open_base(folder).table, groups.get_tensor_model_parallel_rank()
    parameters = logical(engine, trainable=True)
    shares: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        padded = parameter.shape[0] * case.tensor if name.startswith(("embedding", "output_layer")) else None
        shares[name] = {
            f: local_slice(table, name, torch.from_numpy(whole[name]), case.tensor, rank, padded)
            for f, whole in state.fields.items()
        }
    import_state(engine.optimizer, parameters, shares, state.count)
