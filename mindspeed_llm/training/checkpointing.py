"""Training checkpoints: what a rank writes and what a resumed run takes back; `saving` says how it gets there.

    <save>/iter_0000020/args.json                              model, layout, base, LoRA settings, template
    <save>/iter_0000020/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt   {"model": ..., "optimizer": ..., "rng_state": ...}
    <save>/iter_0000020/hf, <save>/iter_0000020/peft           with --save-safetensors: see `training.export`
    <save>/latest_checkpointed_iteration.txt                   written last

`optimizer` is {"master" | "exp_avg" | "exp_avg_sq": {model key: {parameter name: tensor}}, "step": int}: the tensors
lie under their parameter's name in its shape, so they are read at any layout by the weights' own algebra.
"""

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn

from mindspeed_llm.checkpoint.formats.mcore_writer import local_share
from mindspeed_llm.checkpoint.formats.torch_dist_shards import Owner
from mindspeed_llm.checkpoint.formats.torch_file import materialise
from mindspeed_llm.checkpoint.kinds import padded_vocabulary
from mindspeed_llm.checkpoint.layout import ExpertShare, Layout, Rank
from mindspeed_llm.checkpoint.metadata import Metadata
from mindspeed_llm.checkpoint.open import TrainingCheckpoint
from mindspeed_llm.checkpoint.tables import EMBEDDING, OUTPUT_LAYER, expert_number, logical_name
from mindspeed_llm.checkpoint.upstream_args import upstream_args
from mindspeed_llm.device.base import Device
from mindspeed_llm.errors import InputError
from mindspeed_llm.models import parallel
from mindspeed_llm.models.causal_lm import CausalLM
from mindspeed_llm.training.engine import Engine
from mindspeed_llm.training.optimizer_state import FIELDS, export_state, import_state

VALIDATION = ("best_loss", "without_gain", "saved_best", "saved_best_loss")
"""What of `Progress` follows from validation losses."""


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        iteration: steps done. consumed_samples: rows consumed. skipped: steps without an update.
        nan: steps without a finite loss.
        best_loss: lowest validation loss so far. without_gain: validations since.
        saved_best, saved_best_loss: step and validation loss of the best checkpoint; 0 while there is none.
    """

    iteration: int = 0
    consumed_samples: int = 0
    skipped: int = 0
    nan: int = 0
    best_loss: float = math.inf
    without_gain: int = 0
    saved_best: int = 0
    saved_best_loss: float = math.inf


def trainable(chunk: nn.Module) -> dict[str, nn.Parameter]:
    """A chunk's trainable parameters by local name."""
    return {name: p for name, p in chunk.named_parameters() if p.requires_grad}


def current_place(device: Device) -> torch.device:
    """This rank's device."""
    return device.torch_device(torch.distributed.get_node_local_rank(0))


def barrier(device: Device) -> None:
    """Wait for all ranks."""
    torch.distributed.all_reduce(torch.zeros(1, device=current_place(device)))


def own_place() -> Rank:
    """The numbers that name this rank's file."""
    expert = parallel_state.get_expert_model_parallel_rank()
    return Rank(
        parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank(), expert
    )


def owner(engine: Engine, metadata: Metadata) -> Owner:
    """Which shares of the model this rank holds."""
    first_layers = {
        key: chunk.first_layer for key, chunk in zip(metadata.layout.model_keys(), engine.chunks, strict=True)
    }
    return Owner(
        first_layers,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
        ExpertShare(*parallel.expert_place(metadata.model.num_experts)),
    )


def first_of_its_place() -> bool:
    """Whether this rank writes its place's file: the ranks before it hold other shares. Collective."""
    places: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(places, place := own_place())
    return places.index(place) == torch.distributed.get_rank()


def rank_content(
    engine: Engine,
    metadata: Metadata,
    progress: Progress,
    device: Device,
    adapter_only: bool,
    with_optimizer: bool,
    with_rng: bool,
    copied: bool = False,
) -> dict[str, Any]:
    """The content of this rank's file. Collective over DP: optimizer state and random states are gathered.

    Args:
        adapter_only: leave the frozen base out.
        copied: nothing in it shares memory with the live model, so that it may be written while training goes on.
    """
    keys = metadata.layout.model_keys()
    padded = padded_vocabulary(metadata.model.vocab_size, metadata.layout.tp)
    content: dict[str, Any] = {
        "args": upstream_args(metadata.model, metadata.layout, padded, progress.iteration),
        "checkpoint_version": 3.0,
        "iteration": progress.iteration,
        "consumed_train_samples": progress.consumed_samples,
        "skipped_iterations": progress.skipped,
        "nan_iterations": progress.nan,
        "validation": {name: getattr(progress, name) for name in VALIDATION},
    }
    for key, chunk in zip(keys, engine.chunks, strict=True):
        content[key] = model_state(chunk, adapter_only, copied)
    if with_optimizer:
        parts = [export_state(engine.optimizer, trainable(chunk)) for chunk in engine.chunks]
        optimizer: dict[str, Any] = {
            field: {key: {n: s[field] for n, s in state.items()} for key, (state, _) in zip(keys, parts, strict=True)}
            for field in FIELDS
        }
        content["optimizer"] = {**optimizer, "step": max(step for _, step in parts)}
    if with_rng:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        states: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(states, rng_state(device), group=group)
        content["rng_state"] = states
    return content


def model_state(chunk: CausalLM, adapter_only: bool, copied: bool = False) -> dict[str, Tensor | None]:
    """A chunk's state on the CPU, which may be the model's own memory; with `adapter_only` what LoRA adds or trains."""
    trained = trainable(chunk)
    return {
        name: value.detach().to("cpu", copy=copied) if isinstance(value, Tensor) else None
        for name, value in chunk.state_dict().items()
        if not adapter_only or "lora_" in name or name in trained
    }


def rng_state(device: Device) -> dict[str, Any]:
    """Every random generator a step may draw from."""
    return {
        "random": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": device.rng_state().cpu(),
        "tracker": {k: v.cpu() for k, v in get_cuda_rng_tracker().get_states().items()},
    }


def restore_rng(state: dict[str, Any], device: Device) -> None:
    """Put `rng_state`'s generators back."""
    version, words, gauss = state["random"]
    random.setstate((version, tuple(words), gauss))
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    device.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(dict(state["tracker"]))


def load_progress(checkpoint: TrainingCheckpoint) -> Progress:
    """How far the run was that wrote this checkpoint."""
    first = checkpoint.first
    return Progress(
        int(first.get("iteration", 0)),
        int(first.get("consumed_train_samples", 0)),
        int(first.get("skipped_iterations", 0)),
        int(first.get("nan_iterations", 0)),
        **(first.get("validation") or {}),
    )


def load_optimizer(engine: Engine, checkpoint: TrainingCheckpoint) -> None:
    """Take the optimizer's state from a checkpoint of any layout.

    Raises:
        InputError: it was saved without one.
    """
    stored = checkpoint.first.get("optimizer")
    if not stored:
        raise InputError(
            f"{checkpoint.folder}: holds no optimizer state (saved with --no-save-optim, or converted); give "
            "--finetune to start from its weights, or --no-load-optim to go on without"
        )
    sources = {field: checkpoint.section("optimizer", field) for field in FIELDS}
    tp = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    experts = ExpertShare(*parallel.expert_place(checkpoint.config.num_experts))
    for chunk in engine.chunks:
        parameters = trainable(chunk)
        state = {}
        for local, parameter in parameters.items():
            name = checkpoint.table.resolve(logical_name(local, chunk.first_layer, first_expert=experts.first))
            padded = parameter.shape[0] * tp if name in (EMBEDDING, OUTPUT_LAYER) else None
            place = (tp, rank) if expert_number(name) is None else (experts.parts, experts.part)
            state[local] = {field: local_share(source, name, *place, padded) for field, source in sources.items()}
        import_state(engine.optimizer, parameters, state, int(stored["step"]))


def load_rng(checkpoint: TrainingCheckpoint, layout: Layout, device: Device) -> bool:
    """Take this rank's random states; -> False when the layout differs, where they mean nothing."""
    if checkpoint.layout != layout:
        return False
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    states = checkpoint.rng_states(own_place())
    if not states or len(states) != group.size():
        return False
    restore_rng(materialise(states[group.rank()]), device)
    return True
