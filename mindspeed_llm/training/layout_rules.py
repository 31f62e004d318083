"""Which layouts a model is trained at: what is refused, in one line each, before anything is built.

Defects of megatron-core 0.16.1 are named by number; `docs/layouts.md` lists them, and what is done about each.
"""

import math

from mindspeed_llm.arguments.programs import PosttrainOptions
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.errors import UsageError
from mindspeed_llm.models.config import ModelConfig


def training_layout(options: PosttrainOptions, table: WeightTable) -> Layout:
    """The layout of the options, checked against the model and the data.

    Raises:
        UsageError: sizes that do not divide, or that megatron-core does not compute.
    """
    cut, model = options.parallel, table.config
    layout = Layout.create(
        model.num_layers,
        cut.tensor_model_parallel_size,
        cut.pipeline_model_parallel_size,
        cut.num_layers_per_virtual_pipeline_stage,
        ep=cut.expert_model_parallel_size,
        etp=cut.expert_tensor_parallel_size if model.num_experts else None,
    )
    layout.check_experts(model.num_experts)
    check_experts(options, model, layout)
    for entry in table.entries.values():
        entry.shard_map(layout.tp if entry.expert is None else layout.etp, None)
    check_lengths(options, layout)
    return layout


def check_experts(options: PosttrainOptions, model: ModelConfig, layout: Layout) -> None:
    """Refuse experts under tensor parallelism without sequence parallelism, and options without experts."""
    experts = options.experts
    if not model.num_experts:
        given = [name for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff") if getattr(experts, name)]
        if given:
            raise UsageError(f"--{given[0].replace('_', '-')}: the model has no experts; leave it out")
        if options.parallel.expert_tensor_parallel_size not in (None, layout.tp):
            size = options.parallel.expert_tensor_parallel_size
            raise UsageError(f"--expert-tensor-parallel-size {size}: the model has no experts; leave it out")
    elif layout.tp > 1 and not options.parallel.sequence_parallel:
        raise UsageError(
            f"--tensor-model-parallel-size {layout.tp} of a model with experts needs --sequence-parallel: without it "
            "every tensor-parallel rank would send all tokens to the experts, which megatron-core refuses in training"
        )


def length_parts(options: PosttrainOptions) -> int:
    """What sequence lengths must be a multiple of.

    Under CP every rank has two pieces of the sequence; under sequence parallelism each TP rank a part of its pieces.
    """
    cut = options.parallel
    tensor = cut.tensor_model_parallel_size if cut.sequence_parallel else 1
    context = cut.context_parallel_size
    return tensor if context == 1 else context * math.lcm(2, tensor)


def check_lengths(options: PosttrainOptions, layout: Layout) -> None:
    """Refuse a fixed length that does not divide."""
    data, cut = options.data, options.parallel
    parts = length_parts(options)
    if not (data.no_pad_to_seq_lengths or data.lays_out_flat) and data.seq_length % parts:
        why = f"--tensor-model-parallel-size {layout.tp}, which --sequence-parallel needs"
        if cut.context_parallel_size > 1:
            why = f"{parts}, which --context-parallel-size {cut.context_parallel_size} and --sequence-parallel need"
        raise UsageError(f"--seq-length {data.seq_length} does not divide by {why}; change one of them")
