"""What pool processes run for the cost tests: layers built, run and watched. Imports megatron-core."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_llm import device
from mindspeed_llm.device import native
from mindspeed_llm.lora import dropout, fused, overlap
from mindspeed_llm.lora.fused_mlp import AdaptedMlp
from mindspeed_llm.lora.layers import ColumnParallelLora, ParallelLora, RowParallelLora, lora_layers
from mindspeed_llm.models import parallel
from mindspeed_llm.models.mlp import GatedMLP
from tests.distributed.cases import Arrays
from tests.distributed.collectives import Collectives
from tests.lora.layer import Cost, Layer, Report
from tests.lora.worker import cut

PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1}  # name -> where its first factor stands
POINTWISE = {"add", "add_", "mul", "mul_"}


class Watch(TorchDispatchMode):
    """Counts products and element-wise operations while it is entered, and keeps the order of all."""

    def __init__(self, trace: list[tuple[str, int]]) -> None:
        super().__init__()
        self.cost, self.trace = Cost(), trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            left, right = args[PRODUCTS[name] : PRODUCTS[name] + 2]
            self.cost.flops += 2 * left.size(0) * left.size(1) * right.size(1)
            self.trace.append(("compute", -1))
        found = func(*args, **(kwargs or {}))
        if name in POINTWISE:
            self.cost.pointwise += found.numel()
        return found


@contextmanager
def watched(trace: list[tuple[str, int]]) -> Iterator[Cost]:
    """Costs of what runs inside; issues and waits of asynchronous collectives are added to `trace`."""
    watch = Watch(trace)
    collectives = Collectives([("tp", parallel_state.get_tensor_model_parallel_group())])

    class Traced(overlap.Pending):
        def __init__(self, work: Any) -> None:
            super().__init__(work)
            self.number = sum(event == "issue" for event, _ in trace)
            if work is not None:
                trace.append(("issue", self.number))

        def wait(self) -> None:
            if self.work is not None:
                trace.append(("wait", self.number))
            super().wait()

    # a dispatch mode sees torch's operations, not the kernels that stand in for them on a CPU
    plain = mock.patch.object(native, "serves", lambda *tensors: False)
    with mock.patch.object(overlap, "Pending", Traced), plain, collectives, watch:
        yield watch.cost
    watch.cost.collectives = collectives.seen


def run(rank: int, layers: Sequence[Layer], values: Arrays) -> list[Report]:
    """Every layer forward and backward; all are cut over the same number of processes."""
    parallel.start(device.select("cpu"), layers[0].tensor, expert_tensor=layers[0].tensor)
    try:
        return [
            one(layer, {k: torch.from_numpy(v).to(getattr(torch, layer.dtype)) for k, v in values.items()})
            for layer in layers
        ]
    finally:
        parallel.stop()


def one(layer: Layer, full: dict[str, Tensor]) -> Report:
    """One layer's report."""
    torch.manual_seed(7)
    module = build(layer, full)
    gathered, split = layer.kind != "row", layer.sequence_parallel and not layer.expert
    x = cut(full["x"], 0, split) if gathered else cut(full["x"], 2)
    x = x.clone().requires_grad_(layer.input_grad)
    dy = cut(full["dy"], 2) if layer.kind == "column" else cut(full["dy"], 0, split)
    trace: list[tuple[str, int]] = []
    masks, kept = [], {}
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    draw = dropout.Dropout.draw.__func__

    def drawn(cls: Any, p: float, share: int) -> Any:
        masks.append(draw(cls, p, share))
        return masks[-1]

    table = {k: v for k, v in fused.CASES.items() if k != layer.without}
    remembered = mock.patch.object(dropout.Dropout, "draw", classmethod(drawn))
    with mock.patch.dict(fused.CASES, table, clear=True), remembered:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), watched(trace) as forward:
            out = module(x)[0]
        with watched(trace) as backward:
            out.backward(dy)
    tensors = {"out": out, **({"dx": x.grad} if layer.input_grad else {})}
    for name, adapted in (("1", lora_layers(module)[0]), ("2", lora_layers(module)[-1])):
        tensors["da" + name] = adapted.lora_A["default"].weight.grad
        tensors["db" + name] = adapted.lora_B["default"].weight.grad
    arrays = {name: tensor.detach().float().numpy().copy() for name, tensor in tensors.items()}
    inputs = [x] if len(masks) < 2 else [x, torch.empty(layer.length, layer.rows, layer.ffn // layer.tensor)]
    shown = [{"mask": mask.factors(like.detach().float()).numpy()} for mask, like in zip(masks, inputs, strict=False)]
    return Report(arrays, forward, backward, sum(kept.values()), trace, shown)


def build(layer: Layer, full: dict[str, Tensor]) -> nn.Module:
    """The layer with the given values: `w`, `a`, `b`, for an MLP also `w2`, `a2`, `b2`."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=layer.inputs,
        ffn_hidden_size=layer.ffn,
        num_attention_heads=layer.tensor,
        tensor_model_parallel_size=layer.tensor,
        expert_tensor_parallel_size=layer.tensor,
        sequence_parallel=layer.sequence_parallel,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        params_dtype=getattr(torch, layer.dtype),
    )
    if layer.kind == "mlp":
        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        mlp = GatedMLP(config, parts, ffn_hidden_size=layer.ffn)
        gate_up = [torch.cat([cut(half, 0) for half in full[name].chunk(2)]) for name in ("w", "b")]
        mlp.linear_fc1 = adapted(layer, mlp.linear_fc1, gate_up[0], full["a"], gate_up[1])
        mlp.linear_fc2 = adapted(layer, mlp.linear_fc2, cut(full["w2"], 1), cut(full["a2"], 1), full["b2"])
        mlp.whole = AdaptedMlp(mlp.linear_fc1, mlp.linear_fc2) if AdaptedMlp.fits(mlp) else None
        assert (mlp.whole is not None) == layer.fused
        return mlp
    shared = {"config": config, "init_method": nn.init.zeros_, "bias": False, "is_expert": layer.expert}
    if layer.kind == "column":
        base = ColumnParallelLinear(layer.inputs, layer.outputs, gather_output=False, skip_bias_add=True, **shared)
        return adapted(layer, base, cut(full["w"], 0), full["a"], cut(full["b"], 0))
    base = RowParallelLinear(layer.inputs, layer.outputs, input_is_parallel=True, skip_bias_add=True, **shared)
    return adapted(layer, base, cut(full["w"], 1), cut(full["a"], 1), full["b"])


def adapted(layer: Layer, base: nn.Module, w: Tensor, a: Tensor, b: Tensor) -> ParallelLora:
    """The frozen base with its adapter."""
    kind = ColumnParallelLora if isinstance(base, ColumnParallelLinear) else RowParallelLora
    with torch.no_grad():
        base.weight.copy_(w)
    base.requires_grad_(False)
    config = LoraConfig(r=layer.rank, lora_dropout=layer.dropout)
    made = kind(base, "default", config, r=layer.rank, lora_alpha=layer.scaling * layer.rank)
    with torch.no_grad():
        made.lora_A["default"].weight.copy_(a)
        made.lora_B["default"].weight.copy_(b)
    made.use_fused, made.chunk_bytes = layer.fused, layer.chunk_bytes
    return made


def dropped_shares(rank: int, size: int, p: float) -> SimpleNamespace:
    """Masks of this rank's share of an input and of an input all hold, drawn twice each."""
    torch.manual_seed(3)
    like = torch.empty(size)
    draw = dropout.Dropout.draw
    return SimpleNamespace(
        own=[draw(p, rank).factors(like).numpy() for _ in range(2)],
        shared=[draw(p, 0).factors(like).numpy() for _ in range(2)],
    )


def first_draw(rank: int, tensor: int, pipeline: int) -> int:
    """What the host's generator gives first at this layout."""
    parallel.start(device.select("cpu"), tensor, pipeline)
    try:
        return dropout.Dropout.draw(0.5, 0).seed
    finally:
        parallel.stop()
