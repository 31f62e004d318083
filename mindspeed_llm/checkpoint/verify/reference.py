"""The network as transformers computes it, from HF tensors, on the CPU.

Whole, it is loaded as any user loads a model. Streamed, its modules are built without values and filled from the same
tensors just before they run, one decoder layer at a time, by transformers' own conversion of checkpoint names.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_llm.checkpoint.verify.trace import Trace
from mindspeed_llm.checkpoint.verify.view import HfTensors, gathered
from mindspeed_llm.errors import InputError

LAYER = re.compile(r"^model\.layers\.(\d+)\.")
NOT_WEIGHTS = "rotary_emb.inv_freq"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
SPLIT_LLAMA = {
    "model.tok_embeddings.": "model.embed_tokens.",
    "output.": "lm_head.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".attention.wo.": ".self_attn.o_proj.",
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
}
"""InternLM2's names, and a Llama's."""
WQKV = ".attention.wqkv."
LLAMAS = ("InternLM2ForCausalLM", "InternLM3ForCausalLM")
"""Architectures without a class in transformers that are Llamas: the second under the same names."""


class NoReference(Exception):
    """transformers cannot compute this model; the message says why."""


class Lazy:
    """An HF tensor that transformers reads when it wants it, as it reads a slice of a safetensors file."""

    def __init__(self, tensors: HfTensors, name: str, dtype: torch.dtype) -> None:
        self.tensors, self.name, self.dtype = tensors, name, dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self.whole()[index]

    def whole(self) -> Tensor:
        """The tensor, in the type of the network."""
        shape = self.tensors.shape(self.name)
        return gathered(lambda start, stop: self.tensors.read(self.name, start, stop), shape, self.dtype)

    def get_shape(self) -> list[int]:
        """As safetensors' slices answer."""
        return list(self.tensors.shape(self.name))


class AsLlama:
    """InternLM2 or 3 as the Llama it is: names changed, q, k and v taken out of `wqkv`, absent biases zero."""

    def __init__(self, tensors: HfTensors, config: Mapping[str, Any]) -> None:
        """Show `tensors` of a model with this config.json."""
        self.tensors = tensors
        self.heads = config["num_attention_heads"]
        self.groups = config.get("num_key_value_heads") or self.heads
        self.hidden = config["hidden_size"]
        self.head = config.get("head_dim") or self.hidden // self.heads
        self.places: dict[str, tuple[str, int | None]] = {}
        for name in tensors.names():
            if WQKV in name:
                for part, letter in enumerate("qkv"):
                    self.places[name.replace(WQKV, f".self_attn.{letter}_proj.")] = (name, part)
                continue
            renamed = name
            for theirs, ours in SPLIT_LLAMA.items():
                at_start = not theirs.startswith(".")
                if renamed.startswith(theirs) if at_start else theirs in renamed:
                    renamed = renamed.replace(theirs, ours)
            self.places[renamed] = (name, None)
        self.attention_bias = any(name.endswith(("q_proj.bias", "o_proj.bias")) for name in self.places)
        self.mlp_bias = any(name.endswith("down_proj.bias") for name in self.places)
        self.absent = self.absent_biases()

    def absent_biases(self) -> dict[str, int]:
        """Biases a Llama with biases has and this model lacks, with their sizes."""
        sizes = {"q": self.heads * self.head, "k": self.groups * self.head, "v": self.groups * self.head}
        wanted = {}
        for name in self.places if self.attention_bias else ():
            if name.endswith("self_attn.o_proj.weight"):
                module = name.removesuffix("o_proj.weight")
                wanted.update({f"{module}{letter}_proj.bias": size for letter, size in sizes.items()})
                wanted[f"{module}o_proj.bias"] = self.hidden
        return {name: size for name, size in wanted.items() if name not in self.places}

    def names(self) -> list[str]:
        """Names of the Llama's tensors."""
        return [*self.places, *self.absent]

    def shape(self, name: str) -> tuple[int, ...]:
        """In elements."""
        if name in self.absent:
            return (self.absent[name],)
        inner, part = self.places[name]
        if part is None:
            return self.tensors.shape(inner)
        rows = (self.heads if part == 0 else self.groups) * self.head
        return (rows, *self.tensors.shape(inner)[1:])

    def dtype(self, name: str) -> torch.dtype:
        """Element type."""
        return torch.float32 if name in self.absent else self.tensors.dtype(self.places[name][0])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries `start` to `stop` along the first dimension."""
        if name in self.absent:
            return torch.zeros(self.absent[name])[start:stop]
        inner, part = self.places[name]
        if part is None:
            return self.tensors.read(inner, start, stop)
        whole = self.tensors.read(inner)
        queries = self.heads // self.groups
        grouped = whole.view(self.groups, queries + 2, self.head, *whole.shape[1:])
        chosen = grouped[:, :queries] if part == 0 else grouped[:, queries + part - 1 : queries + part]
        return chosen.reshape(-1, *whole.shape[1:])[start:stop]


def model_class(folder: Path, tensors: HfTensors) -> tuple[type, Any, HfTensors]:
    """transformers' class of a folder's model, its configuration, and the tensors under the names that class has.

    Raises:
        NoReference: transformers has no such class; code that comes with a model is not run.
    """
    import transformers

    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = (raw.get("architectures") or ["none"])[0]
    own = getattr(transformers, architecture, None)
    if architecture in LLAMAS and own is None:
        llama = AsLlama(tensors, raw)
        left_out = ("architectures", "model_type", "auto_map", "attention_bias", "mlp_bias", "quantization_config")
        values = {key: value for key, value in raw.items() if key not in left_out}
        config = transformers.LlamaConfig(attention_bias=llama.attention_bias, mlp_bias=llama.mlp_bias, **values)
        return transformers.LlamaForCausalLM, config, llama
    if own is None:
        raise NoReference(f"transformers {transformers.__version__} has no {architecture}; remote code is not run")
    config = own.config_class.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its tensors arrive dequantised
    return own, config, tensors


class Reference:
    """transformers' network over given HF tensors."""

    def __init__(
        self, folder: Path, tensors: HfTensors, streamed: bool, dtype: torch.dtype = torch.float32, untied: bool = False
    ) -> None:
        """Load it, or build it without values.

        Args:
            folder: gives the configuration.
            streamed: keep one decoder layer in memory at a time.
            dtype: of weights and activations.
            untied: the head has its own weight, whatever the configuration says.

        Raises:
            NoReference: transformers has no class for it.
            InputError: transformers misses tensors.
        """
        made, config, self.tensors = model_class(folder, tensors)
        if untied:
            config.tie_word_embeddings = False
        config._attn_implementation = config._experts_implementation = "eager"
        names = [name for name in self.tensors.names() if not name.endswith(NOT_WEIGHTS)]
        self.by_stage: dict[int | None, list[str]] = {}
        for name in names:
            match = LAYER.match(name)
            self.by_stage.setdefault(int(match[1]) if match else None, []).append(name)
        self.config, self.streamed, self.dtype = config, streamed, dtype
        with quiet():
            self.model = self.empty(made) if streamed else self.loaded(made, folder, names)
        self.model.eval()

    def loaded(self, made: type, folder: Path, names: list[str]) -> Any:
        """The model with its values, as any user loads one."""
        state = {name: Lazy(self.tensors, name, self.dtype) for name in names}
        model, info = made.from_pretrained(
            None, config=self.config, state_dict=state, dtype=self.dtype, output_loading_info=True
        )
        missing = sorted(info["missing_keys"]) + [str(one[0]) for one in info["mismatched_keys"]]
        if missing:
            raise InputError(f"{folder}: transformers misses {len(missing)} tensors: {', '.join(missing[:3])}")
        return model

    def empty(self, made: type) -> Any:
        """The model without values; only buffers that follow from the configuration have theirs."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        with torch.device("meta"):
            model = made._from_config(self.config, dtype=self.dtype)
        for module in model.modules():
            derived = [name for name in module._buffers if name in module._non_persistent_buffers_set]
            for name in derived:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            if derived:
                model._init_weights(module)
        self.loading = LoadStateDictConfig(dtype=self.dtype, weight_mapping=get_model_conversion_mapping(model))
        return model

    def fill(self, names: list[str], module: nn.Module) -> None:
        """Give a module's parameters their values; `InputError` when some stay without."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        state = {name: Lazy(self.tensors, name, self.dtype) for name in names}
        with quiet():
            convert_and_load_state_dict_in_model(self.model, state, self.loading)
        lost = [name for name, one in [*module.named_parameters(), *module.named_buffers()] if one.is_meta]
        if lost:
            raise InputError(f"transformers misses {len(lost)} tensors of {names[:1]}: {', '.join(lost[:3])}")

    @torch.no_grad()
    def run(self, ids: Tensor) -> Trace:
        """The run over `ids` [1, s]."""
        trace = Trace()
        hooks = [self.watch(layer, number, trace) for number, layer in enumerate(self.model.model.layers)]
        if self.streamed:
            outside = self.by_stage[None]
            head = [name for name in outside if name == HEAD]
            embedding = [name for name in outside if name == EMBEDDING]
            norm = self.model.model.norm
            self.fill([name for name in outside if name not in (*head, *embedding)], norm)
            hooks.append(self.stage(self.model.model.embed_tokens, embedding))
            hooks.append(self.stage(self.model.lm_head, head, tied=self.config.tie_word_embeddings))
            hooks += [self.stage(one, self.by_stage[number]) for number, one in enumerate(self.model.model.layers)]
        trace.logits = self.model(input_ids=ids, use_cache=False).logits[0]
        for group in hooks:
            for hook in group:
                hook.remove()
        return trace

    def watch(self, layer: nn.Module, number: int, trace: Trace) -> list[Any]:
        """Keep what goes into a layer and what comes out of it."""

        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            trace.inputs.append(hidden[0].clone())
            trace.outputs.append((out[0] if isinstance(out, tuple) else out)[0].clone())

        return [layer.register_forward_hook(after, with_kwargs=True)]

    def stage(self, module: nn.Module, names: list[str], tied: bool = False) -> list[Any]:
        """Fill a module before it runs and empty it afterwards.

        Args:
            tied: its weight is the embedding's.
        """

        def before(one: nn.Module, args: Any) -> None:
            if tied:
                one.weight = nn.Parameter(Lazy(self.tensors, EMBEDDING, self.dtype).whole(), requires_grad=False)
            else:
                self.fill(names, one)

        def after(one: nn.Module, args: Any, out: Any) -> None:
            one.to("meta")

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' progress bars and notes are left out for a while."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
