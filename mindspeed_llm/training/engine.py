"""One optimizer step: micro-batches through the pipeline, gradients finished, weights updated.

A step from top to bottom: `train_step` -> megatron-core's schedule -> `_forward_step` per micro-batch -> `sum_loss`
-> `finalize_model_grads` -> `optimizer.step`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from mindspeed_llm.arguments.optimizer import OptimizerOptions
from mindspeed_llm.lora.inject import attentions, gated_mlps
from mindspeed_llm.lora.layers import lora_layers
from mindspeed_llm.models.causal_lm import IGNORE, CausalLM
from mindspeed_llm.models.expert_marks import sum_partial_gradients
from mindspeed_llm.models.experts import GroupedExperts
from mindspeed_llm.models.packed import packed_rows
from mindspeed_llm.training import pipeline
from mindspeed_llm.training.balance import scale_balance, seen_balance
from mindspeed_llm.training.optimizer_state import inner_optimizers
from mindspeed_llm.training.pipeline import Batch
from mindspeed_llm.training.preference import FIGURES, Preference, with_reference

LORAPLUS = ("*layers.*.lora_B.*", "*layers.*.lora_magnitude_vector.*")
"""Parameters that learn faster under LoRA+: those of the decoder's layers. An embedding's do not; peft has another rate
for them."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, equal on every rank.

    Attributes:
        loss: mean over micro-batches and DP of each micro-batch's mean loss, or the mean over all trained tokens of
            the global batch under per-token loss; nan when no token was trained. Of preferences, pairs take the
            tokens' place.
        tokens: trained tokens of the global batch.
        grad_norm: before clipping.
        updated: False when the step was skipped (non-finite gradients).
        figures: of preferences, see `training.preference.FIGURES`; None where there are none.
        balance: load-balancing loss, its coefficient aside: mean over micro-batches, DP and layers with experts; 1 when
            balanced. None where it is not asked for.
    """

    loss: float
    tokens: int
    grad_norm: float
    updated: bool
    balance: float | None = None
    figures: dict[str, float] | None = None


@dataclass
class Engine:
    """The live model and its optimizer on this rank.

    Attributes:
        chunks: model chunks as built and loaded.
        wrapped: the same chunks in megatron-core's DistributedDataParallel; empty for inference.
        optimizer: megatron-core's optimizer, or None for inference.
        preference: what is learnt from pairs; None to learn the labelled tokens themselves.
        reports: of the last training step on the last pipeline stage, what `sum_loss` reports of each micro-batch.
    """

    chunks: list[CausalLM]
    wrapped: list[DistributedDataParallel]
    optimizer: Any
    preference: Preference | None = None
    reports: list[Tensor] = field(default_factory=list)

    @property
    def config(self) -> Any:
        """megatron-core's TransformerConfig."""
        return self.chunks[0].config


def optimizer_config(
    options: OptimizerOptions, dtype: torch.dtype, distributed: bool, overlap: bool
) -> OptimizerConfig:
    """megatron-core's optimizer settings: AdamW with fp32 master weights and state."""
    return OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
        overlap_param_gather=overlap,
    )


def create_engine(
    chunks: Sequence[CausalLM],
    options: OptimizerOptions,
    distributed_optimizer: bool = False,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
    loraplus_lr_ratio: float | None = None,
    preference: Preference | None = None,
) -> Engine:
    """Wrap loaded chunks for data parallelism and create the optimizer over what is trainable.

    Args:
        loraplus_lr_ratio: of the learning rate of the adapters' B and of vectors in them, as in LoRA+ (Hayou et al.,
            arXiv 2402.12354) and peft; None: all learn alike.
    """
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        use_distributed_optimizer=distributed_optimizer,
        check_for_nan_in_grad=False,  # a step with non-finite gradients is skipped and counted instead
    )
    wrapped = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    settings = optimizer_config(options, config.params_dtype, distributed_optimizer, overlap_param_gather)
    overrides = get_standard_config_overrides(settings)
    if loraplus_lr_ratio is not None:
        faster = {"max_lr": options.lr * loraplus_lr_ratio, "min_lr": options.min_lr * loraplus_lr_ratio}
        overrides[ParamKey(name=LORAPLUS)] = faster
    optimizer = get_megatron_optimizer(settings, wrapped, overrides, use_gloo_process_groups=False)
    if len(getattr(optimizer, "chained_optimizers", ())) == 1:  # a chain of one hides the optimizer's own state
        optimizer = optimizer.chained_optimizers[0]
    config.finalize_model_grads_func = finalize
    config.grad_scale_func = optimizer.scale_loss
    if overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    if overlap_param_gather:
        for chunk in wrapped:
            await_adapters(chunk)
    return Engine(list(chunks), wrapped, optimizer, preference)


def finalize(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
    """megatron-core's completion of gradients, and that of expert parameters it does not know of."""
    finalize_model_grads(chunks, *args, **kwargs)
    sum_partial_gradients(chunks, parallel_state.get_expert_tensor_parallel_group())


def await_adapters(chunk: DistributedDataParallel) -> None:
    """Let every adapter wait for its factors under `overlap_param_gather`.

    megatron-core finishes the gather of a parameter when the module that holds it is called. An adapter reads its
    factors without calling the modules that hold them, an MLP or an attention computed in one step those of both its
    layers, experts computed together those of all: they would never be gathered, or too late, and ranks would drift
    apart.
    """

    def finish(layer: nn.Module, args: Any) -> None:
        for parameter in layer.parameters():
            if parameter in chunk.param_to_bucket_group:
                chunk.param_to_bucket_group[parameter].finish_param_sync()

    whole = [one for one in (*gated_mlps(chunk), *attentions(chunk)) if one.whole is not None]
    experts = [one for one in chunk.modules() if isinstance(one, GroupedExperts) and one.together is not None]
    for layer in (*lora_layers(chunk), *whole, *experts):
        layer.register_forward_pre_hook(finish)


def finish_parameter_sync(engine: Engine) -> None:
    """Give every rank the last step's parameters, which `overlap_param_gather` leaves to the next forward pass.

    To be called before parameters are read by other means than a forward pass: saved, exported, compared. Collective.
    """
    for chunk in engine.wrapped:
        if chunk.use_forward_hook:
            chunk.start_param_sync(force_sync=True)


def sum_loss(losses: Tensor, trained: Tensor, parts: int, per_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [m] of this process's labelled positions of a micro-batch -> (sum, count, report).

    megatron-core divides the sum by the count and the number of micro-batches, or leaves it whole under per-token
    loss; then it averages over DP and CP alike. Under CP the count is therefore that of the whole micro-batch and the
    sum counts c times:  1/(D c) sum_d sum_c  c S_dc / n_d  =  1/D sum_d S_d / n_d.
    The report [S, own count, S / n] owns its memory: the sum is scaled in place.

    Args:
        trained: labelled positions of the micro-batch over all CP ranks. parts: c.
    """
    total, own = losses.sum(), losses.numel()
    count = (torch.full_like(trained, own) if per_token else trained).int()
    mean = total.detach().double() / trained.clamp(min=1)
    report = torch.stack([total.detach().double(), torch.full_like(mean, own), mean])
    return (total if per_token or parts == 1 else total * parts), count, report


def _forward_step(batches: Iterator[Batch], model: Any, preference: Preference | None) -> tuple[Tensor, Any]:
    """One micro-batch through one model chunk."""
    batch = next(batches)
    output = pipeline.forward(batch, model)
    if preference is not None:
        return output, partial(preference.sum_loss, batch=batch)
    trained, parts = (batch["labels"] != IGNORE).sum(), parallel_state.get_context_parallel_world_size()
    per_token = get_model_config(model).calculate_per_token_loss
    return output, partial(sum_loss, trained=trained, parts=parts, per_token=per_token)


class Told(NamedTuple):
    """What a global batch gave, equal on every rank.

    Attributes:
        loss: see `StepResult`.
        count: trained tokens; of preferences, pairs.
        figures: of preferences, tokens and `training.preference.FIGURES`; else empty.
    """

    loss: float
    count: int
    figures: dict[str, float]


def run_microbatches(
    engine: Engine, batches: Sequence[Batch], forward_only: bool, per_token: bool | None = None
) -> Told:
    """Run the micro-batches of one global batch forward (and backward).

    The loss told is the mean per token (or pair), or over micro-batches, as `per_token` says; None: as the engine
    trains. Every rank of a DP replica passes the same batches: the first stage reads the tokens, the last the labels.
    """
    models = engine.wrapped or engine.chunks
    scale_balance(engine, batches)
    if engine.preference is not None:
        batches = with_reference(models, batches)
    step = partial(_forward_step, preference=engine.preference)
    reports = pipeline.run(models, step, batches, forward_only)
    if not forward_only:
        engine.reports = reports
    if per_token is None:
        per_token = engine.config.calculate_per_token_loss
    names = () if engine.preference is None else ("tokens", *FIGURES)
    return _reduce_reports(reports, len(batches), per_token, names, batches[0]["tokens"].device)


def _reduce_reports(
    reports: Sequence[Tensor], micro_batches: int, per_token: bool, names: Sequence[str], device: torch.device
) -> Told:
    """What is told of all micro-batches and DP ranks, from the last stage's reports to every rank.

    per micro-batch:  loss = 1/(D M) sum_d sum_m S_dm / n_dm        (D DP ranks, M micro-batches, S sums, n counts)
    per token:        loss = sum_d sum_m S_dm / sum_d sum_m n_dm

    S and own counts are sums over CP too. Figures (`names`, behind the loss in a report) are means over all n, tokens
    their sum.
    """
    sums = torch.zeros(3 + len(names), dtype=torch.float64)  # sum of S, sum of n, sum of S/n, sums of figures
    for report in reports:
        sums += report.to(sums.device)
    sums = sums.to(device, torch.float64 if device.type == "cpu" else torch.float32)
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    if pipeline_group.size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(sums, last, group=pipeline_group)
    total, count, means, *figures = sums.tolist()
    if count == 0:
        return Told(float("nan"), 0, dict.fromkeys(names, 0.0))
    replicas = parallel_state.get_data_parallel_world_size()
    loss = total / count if per_token else means / (replicas * micro_batches)
    told = {name: value if name == "tokens" else value / count for name, value in zip(names, figures, strict=True)}
    return Told(loss, round(count), told)


def train_step(engine: Engine, batches: Sequence[Batch]) -> StepResult:
    """Train on one global batch.

    Args:
        batches: this DP rank's micro-batches, labels already shifted and IGNORE where nothing is predicted.
    """
    for chunk in engine.wrapped:
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()
    loss, count, figures = run_microbatches(engine, batches, forward_only=False)
    tokens = round(figures.pop("tokens", count))
    updated, grad_norm = _update(engine.optimizer, math.isfinite(loss) or not count)
    return StepResult(loss, tokens, grad_norm, updated, seen_balance(engine, len(batches)), figures or None)


def gradient_norm(optimizer: Any) -> float:
    """The norm of all gradients, those of experts included; collective.

    sqrt(sum over optimizers of n^2): dense and expert parameters have optimizers of their own, whose norms are sums
    over different processes.
    """
    return math.hypot(*(float(one.get_grad_norm()) for one in inner_optimizers(optimizer)))


def _update(optimizer: Any, finite: bool) -> tuple[bool, float]:
    """Clip and apply the gradients; -> (applied, norm before clipping).

    megatron-core would apply non-finite gradients; here such a step changes nothing, nor does one whose loss is not
    `finite`. Loss and norm are the same on every rank, so all decide alike.
    """
    optimizer.prepare_grads()
    limit = optimizer.config.clip_grad
    norm = gradient_norm(optimizer)
    if not (finite and math.isfinite(norm)):
        return False, norm
    for one in inner_optimizers(optimizer) if limit > 0.0 else ():
        if one.get_parameters():
            clip_grad_by_total_norm_fp32(one.get_parameters(), limit, norm)
    return bool(optimizer.step_with_ready_grads()), norm


@torch.no_grad()
def evaluate(engine: Engine, global_batches: Iterator[Sequence[Batch]]) -> float:
    """Mean loss per trained token (or pair) of the batches, however they are cut; nan when no token is trained.

    The model is in evaluation mode meanwhile.
    """
    models = engine.wrapped or engine.chunks
    for model in models:
        model.eval()
    total, count = 0.0, 0
    for batches in global_batches:
        loss, number, _ = run_microbatches(engine, batches, forward_only=True, per_token=True)
        if number:
            total, count = total + loss * number, count + number
    for model in models:
        model.train()
    return total / count if count else float("nan")


def to_device(batch: dict[str, Any], device: torch.device) -> Batch:
    """A collated batch of numpy arrays as device tensors, with only what the model reads."""
    move = partial(torch.as_tensor, device=device)
    moved: Batch = {"tokens": move(batch["tokens"]), "labels": move(batch["labels"])}
    if "pairs" in batch:
        moved |= {"pairs": batch["pairs"], "sequences": move(batch["sequences"])}
    if "lengths" in batch:
        moved["padding"] = move(padding_of(batch))
    if "cu_seqlens" in batch:
        starts = numpy.flatnonzero(batch["position_ids"][0] == 0)
        position_lengths = numpy.diff(starts, append=batch["position_ids"].size)
        lengths, counted = numpy.diff(batch["cu_seqlens"]).tolist(), position_lengths.tolist()
        place = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
        moved["packed"] = packed_rows(lengths, counted, device, place)
    return moved


def padding_of(batch: dict[str, Any]) -> numpy.ndarray:
    """[b, s], True behind the end of each row; of packed rows [1, s], True behind the last."""
    lengths = batch["lengths"][:, None] if "cu_seqlens" not in batch else batch["lengths"].sum()
    return numpy.arange(batch["tokens"].shape[1])[None] >= lengths
