"""What pool processes run for the adapter tests. Imports megatron-core."""

from types import SimpleNamespace

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from peft import LoraConfig

from mindspeed_llm import device
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.checkpoint.tables import logical_name
from mindspeed_llm.lora.inject import inject
from mindspeed_llm.lora.layers import ColumnParallelLora, RowParallelLora, is_lora_parameter, uniform_init
from mindspeed_llm.models import gpt, parallel
from mindspeed_llm.models.config import ModelConfig
from tests.distributed.cases import SIZES, Arrays, Case
from tests.distributed.worker import engine_options, start
from tests.lora.problem import Linear, Outcome


def cut(value: torch.Tensor, dim: int, wanted: bool = True) -> torch.Tensor:
    """This TP rank's block along `dim`, or all of it."""
    group = parallel_state.get_tensor_model_parallel_group()
    return value.chunk(group.size(), dim)[group.rank()].contiguous() if wanted else value


def one_layer(rank: int, linear: Linear, values: Arrays) -> Outcome:
    """One adapted parallel linear layer, forward and backward."""
    parallel.start(device.select("cpu"), linear.tensor)
    try:
        full = {name: torch.from_numpy(value) for name, value in values.items()}
        layer = build(linear, full)
        column, sequence = linear.kind == "column", linear.sequence_parallel
        x = cut(full["x"], 0 if column else 2, sequence or not column).requires_grad_(True)
        out, bias = layer(x)
        out.backward(cut(full["dy"], 2 if column else 0, sequence or column))
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        tensors = {"out": out, "dx": x.grad, "da": a.grad, "db": b.grad}
        if bias is not None:
            tensors["bias"] = bias
        return Outcome({name: tensor.detach().numpy().copy() for name, tensor in tensors.items()})
    finally:
        parallel.stop()


def build(linear: Linear, full: dict[str, torch.Tensor]) -> torch.nn.Module:
    """megatron-core's layer with these values, frozen, and our adapter on it."""
    out_features, in_features = full["w"].shape
    config = TransformerConfig(
        num_layers=1,
        hidden_size=in_features,
        num_attention_heads=linear.tensor,
        tensor_model_parallel_size=linear.tensor,
        sequence_parallel=linear.sequence_parallel,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    shared = {"config": config, "init_method": torch.nn.init.zeros_, "bias": linear.bias}
    shared["skip_bias_add"] = linear.skip_bias_add
    column = linear.kind == "column"
    if column:
        base = ColumnParallelLinear(in_features, out_features, gather_output=False, **shared)
    else:
        base = RowParallelLinear(in_features, out_features, input_is_parallel=True, **shared)
    with torch.no_grad():
        base.weight.copy_(cut(full["w"], 0 if column else 1))
        if linear.bias:
            base.bias.copy_(cut(full["bias"], 0, column))
    base.requires_grad_(False)
    kind = ColumnParallelLora if column else RowParallelLora
    rank = full["a"].size(0)
    layer = kind(base, "default", LoraConfig(r=rank), r=rank, lora_alpha=linear.scaling * rank)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(cut(full["a"], 1, not column))
        layer.lora_B["default"].weight.copy_(cut(full["b"], 0, column))
    layer.use_fused = linear.fused
    return layer


def injected(rank: int, case: Case, model: ModelConfig, targets: tuple[str, ...], seed: int) -> SimpleNamespace:
    """A freshly adapted model's factors by logical name, its marks, and what is trainable."""
    start(case)
    try:
        chunks = gpt.build_chunks(model, engine_options(case), device.select("cpu"))
        inject(chunks, LoraSettings(SIZES.rank, SIZES.alpha, targets), case.fused, seed)
        named = {logical_name(name, chunk.first_layer): p for chunk in chunks for name, p in chunk.named_parameters()}
        return SimpleNamespace(
            tp=parallel_state.get_tensor_model_parallel_rank(),
            factors={n: p.detach().numpy().copy() for n, p in named.items() if is_lora_parameter("." + n)},
            trainable={n for n, p in named.items() if p.requires_grad},
            sequence_parallel={n for n, p in named.items() if getattr(p, "sequence_parallel", False)},
            split={n for n, p in named.items() if getattr(p, "tensor_model_parallel", False)},
        )
    finally:
        parallel.stop()


def drawn(rank: int, shape: tuple[int, int], seed: int) -> numpy.ndarray:
    """A's initial values."""
    return uniform_init(shape, seed).numpy()
