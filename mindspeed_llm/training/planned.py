"""`--plan`, and the check before a run: options and data in the words of `mindspeed_llm.planning`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_llm.arguments.parser import given
from mindspeed_llm.arguments.programs import PosttrainOptions
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.checkpoint.open import BaseSource, open_base
from mindspeed_llm.checkpoint.recorded import holds_tokenizer, tokenizer_folder
from mindspeed_llm.checkpoint.sizes import parse_size
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.data.dataset import PAIR_FIELDS, IndexedDataset
from mindspeed_llm.data.on_the_fly import found_rows, plan_rows
from mindspeed_llm.data.pairs import PairDataset
from mindspeed_llm.data.plan import CHAT_FIELDS
from mindspeed_llm.data.prefixes import Parts, open_parts
from mindspeed_llm.data.sample_lengths import Sampled, sample_lengths
from mindspeed_llm.data.sources import is_self_cognition, parse_spec
from mindspeed_llm.device import cards
from mindspeed_llm.device.base import Device
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.lora.config import check_reference, settings_from_options
from mindspeed_llm.models.config import ModelConfig, check_architecture_flags
from mindspeed_llm.planning.estimate import fullest
from mindspeed_llm.planning.job import Job
from mindspeed_llm.planning.propose import Lengths, Wish, propose
from mindspeed_llm.planning.show import GIB, memory_line, table
from mindspeed_llm.planning.weights import ModelWeights
from mindspeed_llm.training.layout_rules import length_parts
from mindspeed_llm.training.raw_rows import cache_place, data_of, preprocess_options, raw_folder, with_bounds_kept

FIXED = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
    "context_parallel_size": "cp",
    "num_layers_per_virtual_pipeline_stage": "layers_per_chunk",
}
"""Options of `--plan` that fix a size, and its name in `planning.propose.Wish`."""


def lengths_of(options: PosttrainOptions, parts: Parts | None) -> Lengths:
    """Rows as the batches of a run will hold them; without data every row is as long as --seq-length.

    A row padded to the longest of its micro-batch counts at its own length, rounded up. A pair's length is that of its
    longer side, to which the other one is padded.
    """
    longest = options.data.seq_length
    if parts is None:
        return Lengths(longest, longest, 1.0, f"--seq-length {longest}; no data named")
    options = with_bounds_kept(options, parts)
    own = np.minimum(parts.train.source.lengths, longest)
    told = [file for file in parts.files if all(one is not None for one in file.reports)]
    reports = [one for file in told for one in file.reports]
    trained = 1.0
    if sum(one["tokens"] for one in reports):
        places = sum(int(np.sum(file.lengths)) for file in told) * (2 if options.prefers else 1)
        trained = min(1.0, sum(one["trained_tokens"] for one in reports) / places)
    found = laid_out(options, own, trained, f"{len(own):,} {noun(options)}")
    if found.rows is None or not reports or len(told) < len(parts.files) or not any(one.neat_packed for one in told):
        return found
    # what was joined, which a report tells of all parts of a divided data set together
    written = sum(sum(one["histogram"]["rows"]) for one in reports)
    inner = min(longest, max(one["longest_row"] for one in reports)), sum(one["tokens"] for one in reports) / written
    return replace(found, rows=inner)


def noun(options: PosttrainOptions) -> str:
    """What a step is made of."""
    return "pairs" if options.prefers else "rows"


def laid_out(options: PosttrainOptions, own: np.ndarray, trained: float, said: str) -> Lengths:
    """Rows of these lengths (none above --seq-length) as batches hold them.

    Args:
        own: [rows] tokens. trained: share of these that have a label. said: which rows, for people.
    """
    data, longest = options.data, options.data.seq_length
    said = f"{said} of {own.min():,} to {own.max():,} tokens, {own.mean():,.0f} on average"
    if not (data.no_pad_to_seq_lengths or data.lays_out_flat):
        share = trained * float(own.mean()) / longest
        return Lengths(longest, longest, share, f"{said}, padded to --seq-length {longest}")
    multiple = 1 if data.lays_out_flat else data.pad_to_multiple_of
    padded = -(-own // multiple) * multiple
    mean = float(padded.mean())
    rows = (int(own.max()), float(own.mean())) if data.lays_out_flat else None
    return Lengths(int(padded.max()), mean, trained * float(own.mean()) / mean, said, rows)


def raw_lengths(options: PosttrainOptions, tokenizer: str | None) -> Lengths:
    """Raw rows as batches will hold them: as an earlier run has prepared them, else as the first of them are.

    No file is read to its end for this, but one whose rows are all among those first. Memory is planned for rows of
    --seq-length where not all rows were read. Where none can be, for want of a tokenizer or because they are on the
    hub, every row is taken to be that long, which is said.

    Args:
        tokenizer: the HF folder whose tokenizer the rows are made with.
    """
    longest, what = options.data.seq_length, noun(options)
    named = [options.rows.input] if options.rows.input else [parse_spec(one).path for one in options.sources.dataset]
    if options.sources.dataset_dir is not None:  # names of entries; those that lie on the hub only are told when read
        named = []
    far = [one for one in named if not Path(one).expanduser().exists() and not is_self_cognition(one)]
    if tokenizer is None or far:
        why = f"{far[0]} is not on this machine" if far else "--tokenizer-name-or-path, which counts tokens, is missing"
        return Lengths(longest, longest, 1.0, f"{what} of --seq-length {longest} each, assumed: {why}")
    fields, made = PAIR_FIELDS if options.prefers else CHAT_FIELDS, preprocess_options(options, tokenizer)
    plan = plan_rows(made, fields)
    prepared = found_rows(plan, cache_place(options, raw_folder(options)))
    if prepared is not None:
        kind = PairDataset if options.prefers else IndexedDataset
        found = lengths_of(options, open_parts(data_of(options, prepared), kind))
        return replace(found, origin=f"{found.origin}; as prepared in {prepared.parent}")
    seen = sample_lengths(plan)
    own = np.minimum(seen.lengths, longest)
    share = seen.trained / (int(seen.lengths.sum()) * (2 if options.prefers else 1))
    if options.rows.pack:
        packs = f"the first {len(own):,} {what}, {own.mean():,.0f} tokens on average, packed to --seq-length {longest}"
        rows = (int(own.max()) if seen.every else longest, float(own.mean())) if options.rows.neat_pack else None
        return Lengths(longest, longest, share, packs, rows)
    found = laid_out(options, own, share, sampled_text(seen, what))
    if seen.every or found.longest == longest:
        return found
    said = f"{found.origin}; memory for {longest}, as longer ones may follow"
    return replace(found, longest=longest, origin=said, rows=found.rows and (longest, found.rows[1]))


def sampled_text(seen: Sampled, what: str) -> str:
    """Which rows were read, for people."""
    some = f"{'all' if seen.every else 'the first'} {len(seen.lengths):,} {what}"
    if seen.whole is not None and seen.whole < len(seen.lengths):
        return f"{some} of their files, from which {seen.whole:,} are taken,"
    if seen.every:
        return f"{some},"
    return f"{some} of {'more' if seen.whole is None else f'about {seen.whole:,}'},"


def job_of(
    options: PosttrainOptions,
    model: ModelConfig,
    settings: LoraSettings | None,
    layout: Layout,
    processes: int,
    length: int,
    accelerator: bool,
    inner: int | None = None,
) -> Job:
    """The run these options describe, on `processes` ranks, for micro-batches of rows of `length` tokens.

    Args:
        inner: tokens of the longest row within one, where they stand one behind the other; else None.
    """
    cut, training = options.parallel, options.training
    replicas = max(1, processes // (layout.tp * layout.pp * cut.context_parallel_size))
    rows = training.global_batch_size or training.micro_batch_size * replicas
    parts = length_parts(options)
    return Job(
        model=model,
        layout=layout,
        cards=processes,
        context=cut.context_parallel_size,
        sequence_parallel=cut.sequence_parallel and layout.tp > 1,
        dtype=training.dtype_name,
        lora=settings,
        fused=options.lora.lora_fusion,
        fused_mlp=options.lora.use_fused_mlp,
        experts_apart=not options.experts.moe_grouped_gemm,
        recompute=training.recompute_granularity,
        recompute_method=training.recompute_method,
        recompute_layers=training.recompute_num_layers,
        distributed_optimizer=cut.use_distributed_optimizer,
        overlap_param_gather=cut.overlap_param_gather,
        pairs=options.prefers,
        micro_batch=training.micro_batch_size * (2 if options.prefers else 1),  # both answers of a pair
        micro_batches=max(1, rows // (training.micro_batch_size * replicas)),
        length=-(-length // parts) * parts,
        rows=inner,
        accelerator=accelerator,
    )


def check_memory(options: PosttrainOptions, job: Job, device: Device, local_processes: int) -> None:
    """Hold the memory of the fullest rank against the device's.

    Args:
        local_processes: on this machine; on a CPU they share its memory.

    Raises:
        InputError: it is more than there is.
    """
    need, stage = fullest(job, ModelWeights(job.model, job.lora))
    shared = local_processes if device.name == "cpu" else 1
    there = device.capacity()
    if need.total * shared <= there or options.planning.no_memory_check:
        return
    of = f"{shared} processes at about {need.total / GIB:.2f} GiB each" if shared > 1 else "a process"
    what = "the machine has free" if device.name == "cpu" else f"a {device.name} device has"
    raise InputError(
        f"{of} of stage {stage} needs about {need.total * shared / GIB:.2f} GiB ({memory_line(need)}); {what} "
        f"{there / GIB:.2f} GiB. Raise the parallel sizes, lower --micro-batch-size or --seq-length, or add "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 (--plan --cards N proposes "
        "layouts); --no-memory-check goes on all the same"
    )


def wish_of(options: PosttrainOptions) -> Wish:
    """What --plan is asked; reads a config.json, an adapter's settings and the data's lengths, and nothing else.

    Raises:
        UsageError, InputError: as a run with these options would.
    """
    said, load = options.planning, options.checkpoint.load
    if not load:
        raise UsageError("--load is missing: the HF model folder or Megatron checkpoint to plan for")
    family = options.model.model_type_hf
    described = (Path(load) / "config.json").is_file()
    base = None if described else open_base(load, family)
    model = ModelConfig.from_hf(load) if base is None else base.config
    check_architecture_flags(model, options.model, load)
    settings = settings_from_options(options.lora, WeightTable(model))
    if options.lora.lora_load:
        raise UsageError("--plan does not read --lora-load; give --lora-target-modules and --lora-r instead")
    check_reference(options.prefers, settings)
    explicit = given(options)
    fixed: dict[str, Any] = {name: getattr(options.parallel, flag) for flag, name in FIXED.items() if flag in explicit}
    if "micro_batch_size" in explicit:
        fixed["micro_batch"] = options.training.micro_batch_size
    if options.training.recompute_granularity:
        fixed["recompute"] = options.training.recompute_granularity
    dtype = options.training.dtype_name
    size = parse_size(said.card_memory, "--card-memory") if said.card_memory else None
    return Wish(
        model=model,
        settings=settings,
        cards=said.cards or 1,
        card=cards.card(said.card, size, said.card_tflops, said.link_gbps, dtype),
        lengths=planned_lengths(options, base),
        pairs=options.prefers,
        dtype=dtype,
        fused=options.lora.lora_fusion,
        fused_mlp=options.lora.use_fused_mlp,
        experts_apart=not options.experts.moe_grouped_gemm,
        global_batch=options.training.global_batch_size,
        fixed=fixed,
    )


def planned_lengths(options: PosttrainOptions, base: BaseSource | None) -> Lengths:
    """The rows a plan is for.

    Args:
        base: the checkpoint --load names; None where that is an HF folder, which may lack its weights.
    """
    data, load = options.data, str(options.checkpoint.load)
    if data.data_path or data.train_data_path:
        return lengths_of(options, open_parts(data, PairDataset if options.prefers else IndexedDataset))
    if not options.raw_rows:
        return lengths_of(options, None)
    if base is not None:
        return raw_lengths(options, tokenizer_folder(options.tokenizer, base))
    return raw_lengths(options, options.tokenizer.tokenizer_name_or_path or (load if holds_tokenizer(load) else None))


def print_plan(options: PosttrainOptions) -> int:
    """Print what is proposed; -> 0 when a layout fits, else 1."""
    wish = wish_of(options)
    found = propose(wish)
    print(table(wish, found, options.planning.plan_rows))
    return 0 if found[0].memory.total <= wish.usable else 1
