"""What pool processes run to show that megatron-core 0.16.1 still has its defects, in a few lines each.

A function returns what it saw; `docs/layouts.md` has the list. Imports megatron-core.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from mindspeed_llm import device
from mindspeed_llm.checkpoint.open import open_base
from mindspeed_llm.models import parallel
from mindspeed_llm.models.causal_lm import CausalLM
from mindspeed_llm.models.expert_marks import mark_expert_parameter
from mindspeed_llm.models.gpt import build_chunks
from tests.distributed.cases import Case
from tests.distributed.worker import engine_options, start


@contextmanager
def built(case: Case, folder: Path) -> Iterator[CausalLM]:
    """A case's network with uninitialised weights, and its groups as long as it is used."""
    start(case)
    try:
        yield build_chunks(open_base(folder).config, engine_options(case), device.select("cpu"))[0]
    finally:
        parallel.stop()


def refusal(action: Callable[[], Any]) -> str:
    """What megatron-core raises, "" when it does not."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def small(**options: Any) -> TransformerConfig:
    """A configuration of one layer."""
    return TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=4, gradient_accumulation_fusion=False, **options
    )


def norm(rank: int) -> str:
    """1: its torch norm under sequence parallelism."""
    config = small(tensor_model_parallel_size=2, sequence_parallel=True, normalization="RMSNorm")
    return refusal(lambda: WrappedTorchNorm(config, 8))


def schedule(rank: int) -> str:
    """4: an optimizer without a lowest rate."""
    config = OptimizerConfig(optimizer="adam", lr=1e-3)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    rates = {"init_lr": 0.0, "max_lr": config.lr, "min_lr": config.min_lr, "lr_decay_style": "constant"}
    steps = {"lr_warmup_steps": 0, "lr_decay_steps": 1, "wd_incr_steps": 1, "wd_incr_style": "constant"}
    return refusal(lambda: OptimizerParamScheduler(optimizer, start_wd=0.0, end_wd=0.0, **rates, **steps))


def scale_before_build(rank: int) -> str:
    """6: a configuration that knows an optimizer, and with it a process group, when experts copy it."""
    start(Case())
    try:
        config = small()
        config.grad_scale_func = functools.partial(print, parallel_state.get_tensor_model_parallel_group())
        return refusal(lambda: copy.deepcopy(config))
    finally:
        parallel.stop()


def attention(rank: int) -> str:
    """10: its own attention under context parallelism."""
    config = small(context_parallel_size=2)
    return refusal(lambda: DotProductAttention(config, 1, AttnMaskType.causal, "self"))


def weight_under_per_token_loss(rank: int, folder: Path) -> float:
    """14: how much larger the balancing loss's gradient is under per-token loss, before the division by trained tokens.

    On the logits of 11 x 2 positions.
    """
    logits, found = torch.randn(22, 8, generator=torch.Generator().manual_seed(0)), []
    for per_token in (False, True):
        case = Case(model="qwen3-moe", balance=0.3, per_token=per_token)
        with built(case, folder) as chunk:
            router = chunk.decoder.layers[0].mlp.router
            router.set_layer_number(1)
            scores = logits.clone().requires_grad_()
            chosen = torch.zeros_like(logits).scatter(1, logits.topk(3).indices, 1.0).bool()
            probs = TopKRouter._apply_aux_loss(router, torch.ones_like(scores, requires_grad=True), scores, chosen)
            (probs * 0).sum().backward()
            found.append(float(scores.grad.norm()))
    return found[1] / found[0]


def bias_of_an_expert(rank: int) -> tuple[bool, bool]:
    """15: (an expert's row bias is marked as one to be summed over tensor parallelism, with our marks it is)."""
    start(Case(world=2, tensor=2, sequence_parallel=True, expert=2, expert_tensor=1))
    try:
        sizes = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
        config = small(num_moe_experts=2, sequence_parallel=True, perform_initialization=False, **sizes)
        group = parallel_state.get_expert_tensor_parallel_group()
        flags = {"bias": True, "input_is_parallel": True, "skip_bias_add": True, "is_expert": True}
        layer = RowParallelLinear(8, 8, config=config, init_method=torch.nn.init.zeros_, tp_group=group, **flags)
        theirs = layer.bias.sequence_parallel
        mark_expert_parameter(layer.bias, group, None)
        return theirs, layer.bias.sequence_parallel
    finally:
        parallel.stop()


def mask_of_a_later_stage(rank: int, folder: Path) -> tuple[int, int]:
    """16: (positions in the padding mask of a stage without embedding under SP, positions it should have)."""
    case = Case(world=2, tensor=2, sequence_parallel=True, expert=2, expert_tensor=1, model="qwen3-moe")
    with built(case, folder) as chunk:
        chunk.pre_process = False
        chunk.decoder.pre_process = False
        chunk.set_input_tensor(torch.zeros(4, 1, chunk.config.hidden_size))
        found = GPTModel._preprocess(chunk, None, None, padding_mask=torch.zeros(1, 8, dtype=torch.bool))
        return found[5].size(1), 4


def experts_without_sequence_parallelism(rank: int, folder: Path) -> str:
    """17: a step of experts under tensor parallelism alone."""
    with built(Case(world=2, tensor=2, model="qwen3-moe"), folder) as chunk:
        return refusal(lambda: chunk.train()(torch.zeros(1, 8, dtype=torch.long), None, None))
