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
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.live import live_tensors, load_live
from mindspeed_llm.checkpoint.metadata import BaseRecord, Metadata
from mindspeed_llm.checkpoint.recorded import tokenizer_folder
from mindspeed_llm.data.batch import cut_count
from mindspeed_llm.data.dataset import IndexedDataset, RowSource, split_dataset
from mindspeed_llm.data.report import check_data_matches
from mindspeed_llm.data.sampler import EpochSampler
from mindspeed_llm.data.tokenizer import Tokenizer, load_tokenizer
from mindspeed_llm.device.base import Device
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.lora.inject import give_recompute_a_gradient, inject
from mindspeed_llm.lora.sources import shared_hash
from mindspeed_llm.models import parallel
from mindspeed_llm.models.config import check_architecture_flags
from mindspeed_llm.models.gpt import DTYPES, EngineOptions, build_chunks
from mindspeed_llm.training import checkpointing
from mindspeed_llm.training.checkpointing import Progress
from mindspeed_llm.training.engine import Engine, create_engine
from mindspeed_llm.training.export import Export, plan_export
from mindspeed_llm.training.feed import Feed, length_multiple
from mindspeed_llm.training.report import say
from mindspeed_llm.training.schedule import Schedule
from mindspeed_llm.training.start import Start, find_start


@dataclass
class Run:
    """A training run on this rank, ready to step.

    Attributes:
        progress: how far it is; the loop replaces it after every step.
        train_iters: optimizer steps in all. global_batch_size: rows per step over all ranks.
        feed, validation: training and validation batches (None without validation rows).
        metadata: of the checkpoints it will write, iteration aside.
        export: what is written beside them, or None.
    """

    options: PosttrainOptions
    device: Device
    start: Start
    engine: Engine
    schedule: Schedule
    feed: Feed
    validation: Feed | None
    metadata: Metadata
    train_iters: int
    global_batch_size: int
    export: Export | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def first_rank(self) -> bool:
        """Whether this rank speaks for the job."""
        return torch.distributed.get_rank() == 0


def engine_options(options: PosttrainOptions) -> EngineOptions:
    """The engine's view of the options."""
    cut, training = options.parallel, options.training
    return EngineOptions(
        tensor=cut.tensor_model_parallel_size,
        pipeline=cut.pipeline_model_parallel_size,
        layers_per_virtual_stage=cut.num_layers_per_virtual_pipeline_stage,
        sequence_parallel=cut.sequence_parallel and cut.tensor_model_parallel_size > 1,
        dtype=DTYPES[training.dtype_name],
        variable_seq_lengths=options.data.no_pad_to_seq_lengths,
        recompute_granularity=training.recompute_granularity,
        recompute_method=training.recompute_method,
        recompute_num_layers=training.recompute_num_layers,
        calculate_per_token_loss=training.calculate_per_token_loss,
    )


def prepare(options: PosttrainOptions, device: Device) -> Run:
    """Build the run; everything that can be refused is refused before the model is built."""
    start = find_start(options)
    export = plan_export(options, start)
    model = start.base.config
    check_architecture_flags(model, options.model, start.base_path)
    engine = engine_options(options)
    layout = Layout.even(model.num_layers, engine.tensor, engine.pipeline, engine.layers_per_virtual_stage)
    check_divides(options, start, layout)
    dataset, tokenizer = open_data(options, start)
    parallel.start(
        device,
        engine.tensor,
        engine.pipeline,
        layout.vp if layout.vp > 1 else None,
        options.training.seed,
        options.device.distributed_timeout_minutes,
    )
    seed_everything(options.training.seed)
    micro_batches, global_batch_size = batch_sizes(options, layout)
    feed, validation = feeds(options, dataset, tokenizer, device, micro_batches)
    metadata = describe(options, start, layout, dataset, tokenizer)
    train_iters = total_steps(options, len(feed.source), global_batch_size)
    built = build_engine(options, start, engine, device)
    schedule = Schedule(built.optimizer, options.optimizer, train_iters)
    run = Run(
        options, device, start, built, schedule, feed, validation, metadata, train_iters, global_batch_size, export
    )
    if start.resume is not None:
        resume(run)
    return run


def check_divides(options: PosttrainOptions, start: Start, layout: Layout) -> None:
    """Refuse sizes that do not divide, and experts over processes; `UsageError` naming both."""
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        given, only = getattr(options.parallel, name), 1 if name.startswith("expert_model") else layout.tp
        if given not in (None, only):
            raise UsageError(f"--{name.replace('_', '-')} {given}: only {only} is supported in training yet")
    for entry in start.base.table.entries.values():
        entry.shard_map(layout.tp, None)
    data = options.data
    if options.parallel.sequence_parallel and not data.no_pad_to_seq_lengths and data.seq_length % layout.tp:
        raise UsageError(
            f"--seq-length {data.seq_length} does not divide by --tensor-model-parallel-size {layout.tp}, which "
            "--sequence-parallel needs; change one of them"
        )


def seed_everything(seed: int) -> None:
    """Seed the generators outside megatron-core's reach."""
    random.seed(seed)
    numpy.random.seed(seed)


def open_data(options: PosttrainOptions, start: Start) -> tuple[IndexedDataset, Tokenizer | None]:
    """The preprocessed rows and the tokenizer, held against each other.

    Raises:
        UsageError: no --data-path. InputError: no such data, or made with another tokenizer or template.
    """
    if not options.data.data_path:
        raise UsageError("--data-path is missing: the --output-prefix given to preprocess_data.py")
    dataset = IndexedDataset(options.data.data_path)
    if dataset.neat_packed:
        raise InputError(
            f"--data-path {' '.join(options.data.data_path)}: the rows are packed with --neat-pack and must not see "
            "each other, which training does not support yet; preprocess again with --pack or without packing"
        )
    folder = tokenizer_folder(options.tokenizer, start.base)
    tokenizer = load_tokenizer(folder) if folder else None
    if tokenizer is not None:
        for report in dataset.reports:
            check_data_matches(
                report, tokenizer.content_hash, options.tokenizer.prompt_type, options.tokenizer.enable_thinking
            )
    check_resumed_template(start, dataset)
    return dataset, tokenizer


def check_resumed_template(start: Start, dataset: IndexedDataset) -> None:
    """Refuse to continue an adapter on data of another template than it has learnt; `InputError`."""
    recorded = start.resume.metadata if start.resume is not None else None
    found = data_template(dataset)
    if recorded is None or recorded.template is None or found[0] is None:
        return
    if (recorded.template, recorded.enable_thinking) != found:
        raise InputError(
            f"{start.resume.folder} was trained with template {recorded.template} (thinking "
            f"{recorded.enable_thinking}), the data were made with {found[0]} (thinking {found[1]}); preprocess again"
        )


def data_template(dataset: IndexedDataset) -> tuple[str | None, str | None]:
    """(template name, thinking mode) the data were made with, as far as their report says."""
    report = dataset.report or {}
    return report.get("template", {}).get("name"), report.get("enable_thinking")


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
    options: PosttrainOptions, dataset: IndexedDataset, tokenizer: Tokenizer | None, device: Device, micro_batches: int
) -> tuple[Feed, Feed | None]:
    """Training and validation batches of this rank."""
    training, cut = options.training, options.parallel
    train, valid, _ = split_dataset(dataset, options.data.split, training.seed)
    pad_id = 0 if tokenizer is None else next(i for i in (tokenizer.pad_id, tokenizer.eos_id, 0) if i is not None)
    multiple = length_multiple(options.data, cut.tensor_model_parallel_size, cut.sequence_parallel)
    place = device.torch_device(int(os.environ.get("LOCAL_RANK", 0)))

    def feed(source: RowSource, shuffle: bool) -> Feed:
        sampler = EpochSampler(
            len(source),
            training.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            micro_batches,
            training.seed,
            shuffle,
        )
        return Feed(source, sampler, options.data, pad_id, multiple, place)

    return feed(train, not options.data.no_shuffle), feed(valid, False) if len(valid) else None


def total_steps(options: PosttrainOptions, rows: int, global_batch_size: int) -> int:
    """Optimizer steps of the run: --train-iters, or --epochs (default 1) over the training rows."""
    if options.training.train_iters is not None:
        return options.training.train_iters
    return math.ceil((options.training.epochs or 1) * rows / global_batch_size)


def describe(
    options: PosttrainOptions, start: Start, layout: Layout, dataset: IndexedDataset, tokenizer: Tokenizer | None
) -> Metadata:
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
    template, thinking = data_template(dataset)
    return Metadata(
        model=replace(start.base.config, dtype=options.training.dtype_name),
        layout=layout,
        base=base,
        lora=start.settings,
        template=template or options.tokenizer.prompt_type,
        enable_thinking=thinking or options.tokenizer.enable_thinking,
        options=to_dict(options),
    )


def build_engine(options: PosttrainOptions, start: Start, engine: EngineOptions, device: Device) -> Engine:
    """Build the chunks, load the base, add the adapter, wrap for training."""
    chunks = build_chunks(start.base.config, engine, device)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for chunk in chunks:
        load_live(live_tensors(chunk), start.base, tp_rank, engine.tensor, chunk.first_layer)
    if start.settings is not None:
        lora = options.lora
        inject(chunks, start.settings, lora.lora_fusion, options.training.seed, lora.use_fused_mlp)
        if engine.recompute_granularity == "full":
            give_recompute_a_gradient(chunks)
    if start.adapter is not None:
        for chunk in chunks:
            load_live(live_tensors(chunk), start.adapter.tensors, tp_rank, engine.tensor, chunk.first_layer)
    cut = options.parallel
    return create_engine(
        chunks, options.optimizer, cut.use_distributed_optimizer, cut.overlap_grad_reduce, cut.overlap_param_gather
    )


def resume(run: Run) -> None:
    """Continue what `start.resume` holds: progress, optimizer, random state."""
    checkpoint, options = run.start.resume, run.options.checkpoint
    run.progress = checkpointing.load_progress(checkpoint)
    if not options.no_load_optim:
        checkpointing.load_optimizer(run.engine, checkpoint)
    same = options.no_load_rng or checkpointing.load_rng(checkpoint, run.metadata.layout, run.device)
    if not same and run.first_rank:
        say(f"random state of {checkpoint.folder} belongs to another layout; it is seeded anew")
    if run.progress.iteration >= run.train_iters:
        raise InputError(
            f"{checkpoint.folder} is at step {run.progress.iteration} of {run.train_iters}: nothing is left to train; "
            "raise --train-iters"
        )


def count_cut_rows(run: Run) -> int:
    """Training rows longer than --seq-length."""
    return cut_count(run.feed.source, run.options.data.seq_length)
