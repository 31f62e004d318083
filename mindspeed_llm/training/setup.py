"""Everything a run needs, built once from its options: data, model, weights, adapter, optimizer, schedule."""

import math
import os
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy
import torch
from megatron.core import parallel_state

from mindspeed_llm.arguments.parser import to_dict
from mindspeed_llm.arguments.programs import PosttrainOptions
from mindspeed_llm.checkpoint.layout import ExpertShare, Layout
from mindspeed_llm.checkpoint.live import live_tensors, load_live
from mindspeed_llm.checkpoint.metadata import BaseRecord, Metadata
from mindspeed_llm.data.batch import cut_count
from mindspeed_llm.data.prefixes import Part
from mindspeed_llm.data.sampler import EpochSampler, LengthGroupedSampler
from mindspeed_llm.device.base import Device
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.lora.config import check_reference, unlike_layers
from mindspeed_llm.lora.inject import give_recompute_a_gradient, inject
from mindspeed_llm.lora.sources import load_adapter, shared_hash
from mindspeed_llm.models import parallel
from mindspeed_llm.models.config import ModelConfig, check_architecture_flags
from mindspeed_llm.models.gpt import DTYPES, EngineOptions, build_chunks
from mindspeed_llm.training import checkpointing
from mindspeed_llm.training.checkpointing import Progress
from mindspeed_llm.training.engine import Engine, create_engine
from mindspeed_llm.training.export import Export, plan_export
from mindspeed_llm.training.feed import Feed, check_lengths, collate_of, length_multiple
from mindspeed_llm.training.layout_rules import length_parts, training_layout
from mindspeed_llm.training.planned import check_memory, job_of, lengths_of
from mindspeed_llm.training.preference import Preference
from mindspeed_llm.training.raw_rows import with_bounds_kept
from mindspeed_llm.training.report import say
from mindspeed_llm.training.retention import best_checkpoint, remove_leftovers
from mindspeed_llm.training.rows import Rows, open_rows, text_end
from mindspeed_llm.training.schedule import Schedule
from mindspeed_llm.training.start import Start, find_start
from mindspeed_llm.training.together import done_by_one


@dataclass
class Run:
    """A training run on this rank, ready to step.

    Attributes:
        progress: how far it is; the loop replaces it after every step.
        train_iters: optimizer steps in all. global_batch_size: rows per step over all ranks.
        rows: what is read. feed: training batches.
        validation, test: batches of rows held out; None without such rows.
        metadata: of the checkpoints it will write, iteration aside.
        export: what is written beside them, or None.
    """

    options: PosttrainOptions
    device: Device
    start: Start
    engine: Engine
    schedule: Schedule
    rows: Rows
    feed: Feed
    validation: Feed | None
    test: Feed | None
    metadata: Metadata
    train_iters: int
    global_batch_size: int
    export: Export | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def first_rank(self) -> bool:
        """Whether this rank speaks for the job."""
        return torch.distributed.get_rank() == 0


def aux_loss_coefficient(options: PosttrainOptions, model: ModelConfig) -> float:
    """Of the load-balancing loss: the option's, else the model's own where its config.json asks for the loss."""
    given = options.experts.moe_aux_loss_coeff
    if not model.num_experts or options.experts.moe_router_load_balancing_type == "none":
        return 0.0
    if given is not None:
        return given
    own = model.hf_config.get("router_aux_loss_coef") if model.hf_config.get("output_router_logits") else None
    return float(own or 0.0)


def engine_options(options: PosttrainOptions, model: ModelConfig) -> EngineOptions:
    """The engine's view of the options."""
    cut, training = options.parallel, options.training
    return EngineOptions(
        tensor=cut.tensor_model_parallel_size,
        pipeline=cut.pipeline_model_parallel_size,
        context=cut.context_parallel_size,
        expert=cut.expert_model_parallel_size,
        expert_tensor=cut.expert_tensor_parallel_size,
        layers_per_virtual_stage=cut.num_layers_per_virtual_pipeline_stage,
        sequence_parallel=cut.sequence_parallel and cut.tensor_model_parallel_size > 1,
        dtype=DTYPES[training.dtype_name],
        variable_seq_lengths=options.data.no_pad_to_seq_lengths or options.data.lays_out_flat,
        recompute_granularity=training.recompute_granularity,
        recompute_method=training.recompute_method,
        recompute_num_layers=training.recompute_num_layers,
        calculate_per_token_loss=training.calculate_per_token_loss,
        moe_aux_loss=aux_loss_coefficient(options, model),
        moe_aux_loss_type=options.experts.moe_router_load_balancing_type,
        moe_z_loss=options.experts.moe_z_loss_coeff,
        grouped_experts=options.experts.moe_grouped_gemm,
    )


def prepare(options: PosttrainOptions, device: Device) -> Run:
    """Build the run; everything that can be refused is refused before the model is built."""
    start = find_start(options)
    check_reference(options.prefers, start.settings)
    if torch.distributed.get_rank() == 0 and options.checkpoint.save and not options.planning.dry_run:
        for name in remove_leftovers(Path(options.checkpoint.save)):
            say(f"removed {name}, which a killed run left in {options.checkpoint.save}")
    export = plan_export(options, start)
    model = start.base.config
    check_architecture_flags(model, options.model, start.base_path)
    rows = open_rows(options, start)
    options = with_bounds_kept(options, rows.parts)
    engine = engine_options(options, model)
    layout = training_layout(options, start.base.table)
    parallel.start(
        device,
        engine.tensor,
        engine.pipeline,
        layout.vp if layout.vp > 1 else None,
        options.training.seed,
        options.device.distributed_timeout_minutes,
        expert=engine.expert,
        expert_tensor=engine.expert_tensor,
        context=engine.context,
    )
    seed_everything(options.training.seed)
    micro_batches, global_batch_size = batch_sizes(options, layout)
    feed, validation, test = feeds(options, rows, device, micro_batches)
    metadata = describe(options, start, layout, rows)
    train_iters = total_steps(options, len(feed.source), global_batch_size)
    lengths = lengths_of(options, rows.parts)
    world = torch.distributed.get_world_size()
    inner = lengths.rows and lengths.rows[0]
    job = job_of(options, model, start.settings, layout, world, lengths.longest, device.name != "cpu", inner)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    done_by_one(lambda: check_memory(options, job, device, local), True)
    built = build_engine(options, start, engine, device)
    schedule = Schedule(built.optimizer, options.optimizer, train_iters)
    run = Run(
        options, device, start, built, schedule, rows, feed, validation, test, metadata, train_iters,
        global_batch_size, export,
    )  # fmt: skip
    if start.resume is not None:
        resume(run)
    return run


def seed_everything(seed: int) -> None:
    """Seed the generators outside megatron-core's reach."""
    random.seed(seed)
    numpy.random.seed(seed)


def batch_sizes(options: PosttrainOptions, layout: Layout) -> tuple[int, int]:
    """(micro-batches per rank and step, rows per step).

    Raises:
        UsageError: the global batch does not divide, or interleaving cannot use that many micro-batches.
    """
    micro, replicas = options.training.micro_batch_size, parallel_state.get_data_parallel_world_size()
    total = options.training.global_batch_size or micro * replicas
    if total % (micro * replicas):
        raise UsageError(
            f"--global-batch-size {total} does not divide by --micro-batch-size {micro} x {replicas} data-parallel "
            f"replicas; use a multiple of {micro * replicas}"
        )
    number = total // (micro * replicas)
    if layout.vp > 1 and number % layout.pp:
        raise UsageError(
            f"{number} micro-batches per step (--global-batch-size {total}) do not divide by "
            f"--pipeline-model-parallel-size {layout.pp}, which interleaved stages need"
        )
    return number, total


def feeds(
    options: PosttrainOptions, rows: Rows, device: Device, micro_batches: int
) -> tuple[Feed, Feed | None, Feed | None]:
    """Training, validation and test batches of this rank."""
    training, data = options.training, options.data
    multiple = length_multiple(data, length_parts(options))
    place = device.torch_device(int(os.environ.get("LOCAL_RANK", 0)))
    collate = collate_of(data, rows.pad_id, multiple, text_end(options, rows.tokenizer), options.prefers)
    ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    sizes = (training.micro_batch_size, *ranks, micro_batches)
    parts = rows.parts

    def held_out(part: Part | None) -> Feed | None:
        if part is None:
            return None
        blend = part.blend(training.seed, False)
        sampler = EpochSampler(len(part.source), *sizes, training.seed, shuffle=False, blend=blend, once=True)
        return Feed(part.source, sampler, collate, place, data.num_workers)

    source = parts.train.source
    check_lengths(source, data)
    common = {
        "seed": training.seed,
        "cache": rows.index_cache(options),
        "blend": parts.train.blend(training.seed, not data.no_shuffle),
    }
    if data.length_grouping:
        sampler = LengthGroupedSampler(numpy.minimum(source.lengths, data.seq_length), *sizes, **common)
    else:
        sampler = EpochSampler(len(source), *sizes, shuffle=not data.no_shuffle, **common)
    train = Feed(source, sampler, collate, place, data.num_workers)
    return train, held_out(parts.valid), held_out(parts.test)


def total_steps(options: PosttrainOptions, rows: int, global_batch_size: int) -> int:
    """Optimizer steps of the run: --train-iters, or --epochs (default 1) over the training rows."""
    if options.training.train_iters is not None:
        return options.training.train_iters
    return math.ceil((options.training.epochs or 1) * rows / global_batch_size)


def describe(options: PosttrainOptions, start: Start, layout: Layout, rows: Rows) -> Metadata:
    """What this run's checkpoints will say about themselves. Collective: rank 0 hashes the base."""
    recorded = getattr(start.base, "metadata", None)
    if start.settings is not None:
        if start.adapter is not None and start.adapter.base is not None and start.adapter.base.hash:
            known = start.adapter.base.hash
        else:
            known = shared_hash(start.base)
        base = BaseRecord(str(Path(start.base_path).resolve()), known)
    elif recorded is not None:
        base = recorded.base
    else:
        base = BaseRecord(str(Path(start.base_path).resolve()), None)
    return Metadata(
        model=replace(start.base.config, dtype=options.training.dtype_name),
        layout=layout,
        base=base,
        lora=start.settings,
        template=rows.template or options.tokenizer.prompt_type,
        enable_thinking=rows.enable_thinking or options.tokenizer.enable_thinking,
        options=to_dict(options),
    )


def build_engine(options: PosttrainOptions, start: Start, engine: EngineOptions, device: Device) -> Engine:
    """Build the chunks, load the base, add the adapter, wrap for training."""
    chunks = build_chunks(start.base.config, engine, device)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    experts = ExpertShare(*parallel.expert_place(start.base.config.num_experts))
    for chunk in chunks:
        load_live(live_tensors(chunk), start.base, tp_rank, engine.tensor, chunk.first_layer, experts=experts)
    if start.settings is not None:
        lora = options.lora
        fresh = start.adapter is None
        inject(chunks, start.settings, lora.lora_fusion, options.training.seed, lora.use_fused_mlp, fresh)
        if engine.recompute_granularity == "full":
            give_recompute_a_gradient(chunks)
        tells = engine.grouped_experts and torch.distributed.get_rank() == 0
        if unlike := unlike_layers(start.settings, start.base.config) if tells else []:
            said = ", ".join(map(str, unlike))
            say(f"experts of layers {said} are not all adapted alike: they run one after another, not together")
    if start.adapter is not None:
        for chunk in chunks:
            load_adapter(chunk, start.adapter, tp_rank, engine.tensor, experts)
    cut = options.parallel
    return create_engine(
        chunks, options.optimizer, cut.use_distributed_optimizer, cut.overlap_grad_reduce, cut.overlap_param_gather,
        options.lora.loraplus_lr_ratio, Preference.of(options.preference) if options.prefers else None,
    )  # fmt: skip


def resume(run: Run) -> None:
    """Continue what `start.resume` holds: progress, optimizer, random state."""
    checkpoint, options = run.start.resume, run.options.checkpoint
    run.progress = checkpointing.load_progress(checkpoint)
    if best_checkpoint(Path(options.save or ""), run.progress) is None:
        run.progress = replace(run.progress, saved_best=0, saved_best_loss=math.inf)
    if not options.no_load_optim:
        checkpointing.load_optimizer(run.engine, checkpoint)
    same = options.no_load_rng or checkpointing.load_rng(checkpoint, run.metadata.layout, run.device)
    if not same and run.first_rank:
        say(f"random state of {checkpoint.folder} belongs to another layout; it is seeded anew")
    if (done := finished(run)) and not options.auto_resume:
        raise InputError(f"{checkpoint.folder} {done}")


def finished(run: Run) -> str:
    """Why nothing is left to train, and what would change that; empty while something is."""
    done, patience = run.progress, run.options.checkpoint.early_stopping_patience
    if done.iteration >= run.train_iters:
        return f"is at step {done.iteration} of {run.train_iters}: nothing is left to train; raise --train-iters"
    if patience is not None and done.without_gain >= patience:
        return (
            f"is at step {done.iteration}, and {done.without_gain} validations in a row had no lower loss, as many as "
            f"--early-stopping-patience {patience} allows; raise it to train on"
        )
    return ""


def count_cut_rows(run: Run) -> int:
    """Training rows longer than --seq-length."""
    return cut_count(run.feed.source, run.options.data.seq_length)
