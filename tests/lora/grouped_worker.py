"""In a process of a pool: the experts of one model, computed together and apart. Imports megatron-core."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mindspeed_llm import device
from mindspeed_llm.checkpoint.layout import ExpertShare
from mindspeed_llm.checkpoint.live import live_tensors, load_live
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.checkpoint.open import open_base
from mindspeed_llm.lora.inject import inject
from mindspeed_llm.lora.layers import adapters_off, lora_layers
from mindspeed_llm.models import gpt, parallel
from mindspeed_llm.models.experts import GroupedExperts
from mindspeed_llm.training.engine import Engine, create_engine, run_microbatches
from mindspeed_llm.training.optimizer_state import export_gradients
from tests.distributed import worker
from tests.distributed.cases import Arrays, Case


@dataclass
class Seen:
    """Gradients of one global batch; how many layers computed their experts together; the base's logits."""

    together: int
    gradients: Arrays
    base: list[Any] = field(default_factory=list)


def experts_of(engine: Engine) -> list[GroupedExperts]:
    return [one for chunk in engine.chunks for one in chunk.modules() if isinstance(one, GroupedExperts)]


def build(settings: LoraSettings, case: Case, folder: Path) -> Engine:
    """The case's engine with adapters whose factors are drawn, the same in every form."""
    base = open_base(folder)
    chunks = gpt.build_chunks(base.config, worker.engine_options(case), device.select("cpu"))
    experts = ExpertShare(*parallel.expert_place(base.config.num_experts))
    load_live(live_tensors(chunks[0]), base, experts=experts)
    inject(chunks, settings, case.fused, 1, case.fused_mlp)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for layer in lora_layers(chunks[0]):
            for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                factor.copy_(0.2 * torch.randn(factor.shape, generator=generator))
    return create_engine(chunks, worker.OPTIONS)


def run(rank: int, cases: list[Case], folder: Path, step: Any, settings: LoraSettings) -> list[Seen]:
    """What each case's engine gives of one global batch."""
    found = []
    for case in cases:
        own = mock.patch.object(worker, "build", lambda *args: build(settings, *args[:2]))
        with own, worker.live(case, folder, {}) as engine:
            found.append(measure(engine, step))
    return found


def measure(engine: Engine, step: Any) -> Seen:
    """One global batch in training mode, and the base's logits."""
    for chunk in engine.wrapped:
        chunk.zero_grad_buffer()
        chunk.train()
    torch.manual_seed(3)
    run_microbatches(engine, worker.share(step), forward_only=False)
    gradients = worker.arrays(export_gradients(engine.optimizer, worker.logical(engine, trainable=True)))
    with torch.no_grad(), adapters_off(engine.chunks[0]):
        base = worker.real_logits(engine, worker.share(step))
    return Seen(sum(one.together is not None for one in experts_of(engine)), gradients, base)
