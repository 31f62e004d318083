"""What a PEFT adapter adds to each HF tensor, as peft itself merges it: in float64, one decoder layer at a time.

peft decides which modules are adapted, by which factors and how they are scaled (patterns, rslora, DoRA, whole
modules, blocks of experts); nothing of our own reading of PEFT folders is used.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_llm.checkpoint.verify.exact import Delta
from mindspeed_llm.checkpoint.verify.reference import EMBEDDING, HEAD, LAYER, NoReference, Reference, quiet
from mindspeed_llm.checkpoint.verify.view import HfTensors
from mindspeed_llm.errors import InputError

CONFIG = "adapter_config.json"
ADAPTER = "default"
DORA_STEPS = 16
"""float32 steps that DoRA's length and quotient may cost a merged value."""


def is_peft_folder(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(folder) / CONFIG).is_file()


class PeftDeltas:
    """A PEFT adapter on the HF folder of its base."""

    def __init__(self, folder: Path, tensors: HfTensors, adapter: Path, weight: float = 1.0) -> None:
        """Load the adapter onto a base without values.

        Args:
            folder: gives the base's configuration.
            tensors: the base's weights.
            weight: factor of the whole adapter.

        Raises:
            NoReference: transformers has no class for the base.
            InputError: peft cannot load the adapter.
        """
        from peft import PeftModel

        self.path, self.tensors, self.weight = adapter, tensors, weight
        self.twin = Reference(folder, tensors, True, torch.float64)
        if self.twin.tensors is not tensors:
            raise NoReference("the base has no class of its own in transformers, so peft cannot load an adapter on it")
        base = without_memory(Reference(folder, tensors, True, torch.float64).model)
        try:
            with quiet():
                self.adapted = PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=False)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{adapter}: peft cannot load it ({error})") from error
        self.inner: nn.Module = self.adapted.base_model.model
        for name, parameter in self.adapted.named_parameters():
            if ".lora_" in name or "modules_to_save" in name:
                parameter.data = parameter.data.double()
        self.lock = threading.Lock()
        self.stage: int | None = -1
        self.held: dict[str, Delta] = {}

    def delta(self, name: str, start: int = 0, stop: int | None = None) -> Delta | None:
        """What it adds to entries `start` to `stop` of an HF tensor; None where it adds nothing."""
        match = LAYER.match(name)
        stage = int(match[1]) if match else None
        with self.lock:  # transformers reads tensors in several threads
            if stage != self.stage:
                self.held, self.stage = self.computed(stage), stage
            found = self.held.get(name)
        if found is None:
            return None
        return Delta(self.weight * found.value[start:stop], abs(self.weight) * found.scale[start:stop], found.rank)

    @torch.no_grad()
    def computed(self, stage: int | None) -> dict[str, Delta]:
        """The deltas of one layer's HF tensors, or of those outside layers."""
        if stage is not None and stage >= len(self.twin.model.model.layers):
            return {}  # a prediction layer, which transformers does not have
        root = "" if stage is None else f"model.layers.{stage}."
        before = dict(self.base_values(stage, root))
        for name, value in before.items():
            set_value(self.inner, name, value.clone())
        scales = {name: torch.zeros_like(value) for name, value in before.items()}
        rank = 1
        for path, layer in self.adapted_modules(root):
            name = parameter_name(path, layer)
            if ADAPTER in layer.lora_A or ADAPTER in getattr(layer, "lora_embedding_A", {}):
                scales[name] += absolute_delta(layer)
                rank = max(rank, layer.r[ADAPTER])
                plain = before[name] + layer.get_delta_weight(ADAPTER)
                layer.merge(adapter_names=[ADAPTER])
                if layer.use_dora.get(ADAPTER):
                    merged = value_of(self.inner, name)
                    ratio = merged.abs().sum(-1, keepdim=True) / plain.abs().sum(-1, keepdim=True)
                    scales[name] = scales[name] * ratio + DORA_STEPS * merged.abs()
                layer.merged_adapters.clear()
        values = {name: value_of(self.inner, name) - value for name, value in before.items()}
        for name in before:
            set_value(self.inner, name, None)
        deltas, scales = (self.as_stored(one) for one in (values, scales))
        return {name: Delta(value, scales[name], rank) for name, value in deltas.items() if value.any()}

    def base_values(self, stage: int | None, root: str) -> Iterator[tuple[str, Tensor]]:
        """(name in memory, value) of a layer's tensors, or of those outside layers."""
        model = self.twin.model
        names = self.twin.by_stage[stage]
        if stage is None:
            outside: list[nn.Module] = [model.model.embed_tokens, model.model.norm, model.lm_head]
            self.twin.fill(names, model.model.norm)
            if HEAD not in names:
                model.lm_head.weight = nn.Parameter(self.tensors.read(EMBEDDING).double())
            owners = zip(("model.embed_tokens.", "model.norm.", "lm_head."), outside, strict=True)
        else:
            self.twin.fill(names, model.get_submodule(root.removesuffix(".")))
            owners = iter([(root, model.get_submodule(root.removesuffix(".")))])
        for prefix, module in owners:
            stored = set(module.state_dict())
            for name, value in [*module.named_parameters(), *module.named_buffers()]:
                if name in stored:
                    yield prefix + name, value.detach()
            module.to("meta")

    def adapted_modules(self, root: str) -> Iterator[tuple[str, Any]]:
        """(path without peft's wrappers, peft's layer) below `root`; outside layers when it is empty."""
        from peft.tuners.lora import LoraLayer

        for path, module in self.inner.named_modules():
            plain = path.replace(".base_layer", "")
            if isinstance(module, LoraLayer) and (plain.startswith(root) if root else ".layers." not in plain):
                yield plain, module

    def as_stored(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in memory under the names, and in the form, of the HF folder."""
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.twin.model, values)


def without_memory(model: nn.Module) -> nn.Module:
    """A model without values as one of zeros on the CPU that all lie in the same place."""
    for module in model.modules():
        for name, one in module._parameters.items():
            if one is not None and one.is_meta:
                zeros = torch.zeros((), dtype=one.dtype).expand(one.shape)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    return model


def parameter_name(path: str, layer: Any) -> str:
    """The name of the parameter that a layer of peft adapts."""
    return f"{path}.{getattr(layer, 'parameter_name', 'weight')}"


def absolute_delta(layer: Any) -> Tensor:
    """|scaling| |B| |A|, in the form peft gives the delta."""
    factors = [
        getattr(one, "weight", one)
        for kind in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
        for key, one in getattr(layer, kind, {}).items()
        if key == ADAPTER
    ]
    kept = [one.data for one in factors]
    for one in factors:
        one.data = one.data.abs()
    found = layer.get_delta_weight(ADAPTER).abs()
    for one, values in zip(factors, kept, strict=True):
        one.data = values
    return found


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, nn.Module | None, str]:
    """(the base module that holds a parameter, peft's replacement of the whole module, the parameter's name there)."""
    path, _, last = name.rpartition(".")
    module, saved = model, None
    for part in path.split("."):
        module = getattr(module, part)
        while hasattr(module, "base_layer") or hasattr(module, "original_module"):
            if hasattr(module, "original_module"):
                kept = module.modules_to_save  # a ModuleDict, which has no get
                saved = kept[ADAPTER] if ADAPTER in kept else None  # noqa: SIM401
                module = module.original_module
            else:
                module = module.base_layer
    return module, saved, last


def set_value(model: nn.Module, name: str, value: Tensor | None) -> None:
    """Give a base parameter a value, or take it away."""
    module, _, last = owner_of(model, name)
    old = getattr(module, last)
    value = torch.empty_like(old, device="meta") if value is None else value
    if last in module._buffers:
        module._buffers[last] = value
    else:
        module._parameters[last] = nn.Parameter(value, requires_grad=False)


def value_of(model: nn.Module, name: str) -> Tensor:
    """A parameter's value after merging: that of the whole module saved with the adapter, where there is one."""
    module, saved, last = owner_of(model, name)
    return getattr(module if saved is None else saved, last).detach()
