"""The tensors an engine holds between steps, by class of memory."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from mindspeed_llm.lora.layers import is_lora_parameter
from mindspeed_llm.training.engine import Engine
from mindspeed_llm.training.optimizer_state import inner_optimizers


def tensors_by_class(engine: Engine) -> dict[str, list[Tensor]]:
    """Class (`planning.tracker.CLASSES`) -> tensors.

    In full tuning the trainable weights are weights. Tensors that share memory count where they stand first: float32
    parameters are their own master copies.
    """
    named = [pair for chunk in engine.chunks for pair in chunk.named_parameters()]
    buffers = [one for chunk in engine.wrapped for one in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return {
        "adapters": [p.data for name, p in named if is_lora_parameter(name)],
        "weights": [p.data for name, p in named if not is_lora_parameter(name)],
        "gradients": [buffer.grad_data for buffer in buffers],
        "optimizer": [one for part in inner_optimizers(engine.optimizer) for one in _masters_and_state(part)],
    }


def _masters_and_state(optimizer: Any) -> list[Tensor]:
    inner = optimizer.optimizer
    if inner is None:  # a rank that holds no parameter of this kind
        return []
    masters = [p.data for group in inner.param_groups for p in group["params"]]
    return masters + [one for one in tree_leaves(list(inner.state.values())) if isinstance(one, Tensor)]
