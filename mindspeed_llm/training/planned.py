"""`--plan`, and the check before a run: options and data in the words of `mindspeed_llm.planning`."""

from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_llm.arguments.parser import given
from mindspeed_llm.arguments.programs import PosttrainOptions
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.checkpoint.open import open_base
from mindspeed_llm.checkpoint.sizes import parse_size
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.data.prefixes import Parts, open_parts
from mindspeed_llm.device import cards
from mindspeed_llm.device.base import Device
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.lora.config import settings_from_options
from mindspeed_llm.models.config import ModelConfig, check_architecture_flags
from mindspeed_llm.planning.estimate import fullest
from mindspeed_llm.planning.job import Job
from mindspeed_llm.planning.propose import Lengths, Wish, propose
from mindspeed_llm.planning.show import GIB, memory_line, table
from mindspeed_llm.planning.weights import ModelWeights
from mindspeed_llm.training.layout_rules import length_parts

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

    A row padded to the longest of its micro-batch counts at its own length, rounded up.
    """
    data, longest = options.data, options.data.seq_length
    if parts is None:
        return Lengths(longest, longest, 1.0, f"--seq-length {longest}; no data named")
    own = np.minimum(parts.train.source.lengths, longest)
    reports = [one for file in parts.files for one in file.reports if one is not None]
    tokens = sum(one["tokens"] for one in reports)
    trained = sum(one["trained_tokens"] for one in reports) / tokens if tokens else 1.0
    said = f"{len(own):,} rows of {own.min():,} to {own.max():,} tokens, {own.mean():,.0f} on average"
    if not (data.no_pad_to_seq_lengths or data.lays_out_flat):
        share = trained * float(own.mean()) / longest
        return Lengths(longest, longest, share, f"{said}, padded to --seq-length {longest}")
    multiple = 1 if data.lays_out_flat else data.pad_to_multiple_of
    padded = -(-own // multiple) * multiple
    return Lengths(int(padded.max()), float(padded.mean()), trained * float(own.mean() / padded.mean()), said)


def job_of(
    options: PosttrainOptions,
    model: ModelConfig,
    settings: LoraSettings | None,
    layout: Layout,
    processes: int,
    length: int,
    accelerator: bool,
) -> Job:
    """The run these options describe, on `processes` ranks, for micro-batches of rows of `length` tokens."""
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
        micro_batch=training.micro_batch_size * (2 if options.prefers else 1),  # both answers of a pair
        micro_batches=max(1, rows // (training.micro_batch_size * replicas)),
        length=-(-length // parts) * parts,
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
    if options.prefers:
        raise UsageError("--plan knows --stage sft; for --stage dpo plan that with twice the --micro-batch-size")
    if not load:
        raise UsageError("--load is missing: the HF model folder or Megatron checkpoint to plan for")
    family = options.model.model_type_hf
    described = (Path(load) / "config.json").is_file()
    model = ModelConfig.from_hf(load) if described else open_base(load, family).config
    check_architecture_flags(model, options.model, load)
    settings = settings_from_options(options.lora, WeightTable(model))
    if options.lora.lora_load:
        raise UsageError("--plan does not read --lora-load; give --lora-target-modules and --lora-r instead")
    data = options.data
    parts = open_parts(data) if data.data_path or data.train_data_path else None
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
        lengths=lengths_of(options, parts),
        dtype=dtype,
        fused=options.lora.lora_fusion,
        fused_mlp=options.lora.use_fused_mlp,
        experts_apart=not options.experts.moe_grouped_gemm,
        global_batch=options.training.global_batch_size,
        fixed=fixed,
    )


def print_plan(options: PosttrainOptions) -> int:
    """Print what is proposed; -> 0 when a layout fits, else 1."""
    wish = wish_of(options)
    found = propose(wish)
    print(table(wish, found, options.planning.plan_rows))
    return 0 if found[0].memory.total <= wish.usable else 1
