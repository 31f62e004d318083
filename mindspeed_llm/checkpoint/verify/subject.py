"""Our side: the live megatron-core network over logical tensors, on the CPU, in this one process.

Whole, it is built and loaded as for inference. Streamed, each decoder layer is built alone when its turn comes, filled
from the source, and dropped; embedding and head have their values only while they run.

Shapes: s tokens, h hidden, v vocabulary; a batch of one row.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from mindspeed_llm.checkpoint.formats.lazy import TensorSource
from mindspeed_llm.checkpoint.live import live_tensors, load_live
from mindspeed_llm.checkpoint.verify.exact import Adapter
from mindspeed_llm.checkpoint.verify.trace import Trace, layer_difference
from mindspeed_llm.checkpoint.verify.view import gathered
from mindspeed_llm.device.base import Device
from mindspeed_llm.models import parallel
from mindspeed_llm.models.causal_lm import CausalLM
from mindspeed_llm.models.gpt import EngineOptions, build_chunks, transformer_config
from mindspeed_llm.models.layer import layer_spec

LAYERS = "decoder.layers."


@contextmanager
def engine(device: Device) -> Iterator[None]:
    """megatron-core's groups for one process; what was there before stays."""
    connected = torch.distributed.is_initialized()
    running = parallel_state.model_parallel_is_initialized()
    if not running:
        parallel.start(device)
    try:
        yield
    finally:
        if not running:
            parallel.stop()
        if not connected:
            parallel.disconnect()


class Streamed(nn.Module):
    """A decoder layer that is built and filled when it runs, and dropped afterwards."""

    def __init__(self, spec: ModuleSpec, make: Callable[["Streamed"], nn.Module], **arguments: Any) -> None:
        """Keep what the layer is built from.

        Args:
            spec: of the true layer.
            make: builds and fills it.
            arguments: that megatron-core's block gives its layers.
        """
        super().__init__()
        self.spec, self.make, self.arguments = spec, make, arguments
        self.layer_number = arguments["layer_number"]

    def build(self) -> nn.Module:
        """The true layer, without values."""
        return build_module(self.spec, **self.arguments)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the true layer computes."""
        with_values = self.make(self)
        return with_values(*args, **kwargs)


class Subject:
    """The live network over a source; with an adapter, that runs beside the base, unmerged."""

    def __init__(
        self,
        source: TensorSource,
        device: Device,
        streamed: bool,
        dtype: torch.dtype = torch.float32,
        adapter: Adapter | None = None,
    ) -> None:
        """Build it; `engine` has to be active.

        Args:
            streamed: keep one decoder layer in memory at a time.
            dtype: of weights and activations.
            adapter: runs beside the base.
        """
        self.options = EngineOptions(dtype=dtype, grouped_experts=False)  # factors stand beside each expert's layers
        self.source, self.device, self.streamed, self.adapter = source, device, streamed, adapter
        self.truth: Trace | None = None
        self.trace = Trace()
        if streamed:
            self.chunk = self.empty()
        else:
            (self.chunk,) = build_chunks(source.config, self.options, device)
            load_live(live_tensors(self.chunk), source)
            for number, layer in enumerate(self.chunk.decoder.layers):
                self.adapt(layer, number)
                layer.register_forward_hook(self.watch(number), with_kwargs=True)
        self.chunk.eval()

    def empty(self) -> CausalLM:
        """The network with layers still to be built, and an embedding and a head without values."""
        model = self.source.config
        config = transformer_config(model, self.options, self.device)
        specs = [
            ModuleSpec(module=Streamed, params={"spec": layer_spec(model, number, self.device), "make": self.make})
            for number in range(model.num_layers)
        ]
        layers = TransformerBlockSubmodules(layer_specs=specs, layer_norm=self.device.rms_norm)
        chunk = CausalLM(model, config, layers, self.device.torch_device(0), first=True, last=True, vp_stage=None)
        embedding = chunk.embedding.word_embeddings
        self.lend(embedding, "embedding.word_embeddings.weight", embedding.weight)
        self.lend(chunk.output_layer, "output_layer.weight", chunk.head_weight)
        self.copy("decoder.final_layernorm.weight", chunk.decoder.final_layernorm.weight)
        return chunk

    def lend(self, module: nn.Module, name: str, parameter: Tensor) -> None:
        """Give a parameter its values while a module runs, and no longer."""
        parameter.data = torch.empty(0)

        def before(one: nn.Module, args: Any) -> None:
            shape = self.source.shape(name)
            parameter.data = gathered(functools.partial(self.rows, name), shape, self.options.dtype)

        def after(one: nn.Module, args: Any, out: Any) -> None:
            parameter.data = torch.empty(0)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a logical tensor."""
        return self.source.read(name, [(start, stop)])

    @torch.no_grad()
    def copy(self, name: str, parameter: Tensor) -> None:
        """Give a parameter its values for good."""
        parameter.copy_(self.source.read(name))

    def make(self, place: Streamed) -> nn.Module:
        """A layer with its values, watched."""
        number, layer = place.layer_number - 1, place.build().eval()
        tensors = {f"{LAYERS}0.{name}": one for name, one in live_tensors(layer).items()}
        load_live(tensors, self.source, first_layer=number)
        self.adapt(layer, number)
        layer.register_forward_hook(self.watch(number), with_kwargs=True)
        return layer

    def adapt(self, layer: nn.Module, number: int) -> None:
        """Let the adapter's factors run beside the linear modules of a layer."""
        prefix = f"{LAYERS}{number}."
        for module in sorted(self.adapter.modules()) if self.adapter else ():
            if module.startswith(prefix):
                linear = layer.get_submodule(module.removeprefix(prefix))
                for pair in self.adapter.pairs(module):
                    linear.register_forward_hook(beside(*pair, self.options.dtype))

    def watch(self, number: int) -> Callable[..., None]:
        """A hook that runs a layer once more, on the truth's input, and keeps what goes in and out where asked."""

        def after(layer: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            if self.truth is None:
                hidden = args[0] if args else kwargs["hidden_states"]
                self.trace.inputs.append(hidden[:, 0].clone())
                self.trace.outputs.append(out[0][:, 0].clone())
                return
            given = self.truth.inputs[number].unsqueeze(1)  # [s, 1, h]
            again = layer.forward(given, *args[1:], **{k: v for k, v in kwargs.items() if k != "hidden_states"})
            difference = layer_difference(again[0][:, 0], self.truth.outputs[number])
            self.trace.layer_differences.append(difference)

        return after

    @torch.no_grad()
    def run(self, ids: Tensor, truth: Trace | None = None) -> Trace:
        """The run over `ids` [1, s]; its layers are held against `truth`'s, or kept where there is none."""
        self.truth, self.trace = truth, Trace()
        out = self.chunk(ids, None, None, runtime_gather_output=True)
        self.trace.logits = out[0, :, : self.source.config.vocab_size].clone()
        return self.trace


def beside(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Callable[..., Any]:
    """A hook that adds scaling * B A x to what a linear module of megatron-core gives.

    Args:
        a: [r, in].
        b: [out, r].
    """
    a, b = a.to(dtype), b.to(dtype)

    def after(module: nn.Module, args: tuple, out: Any) -> Any:
        delta = nn.functional.linear(nn.functional.linear(args[0], a), b) * scaling
        return (out[0] + delta, *out[1:])

    return after
