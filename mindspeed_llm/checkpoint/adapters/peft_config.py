"""`adapter_config.json`: what peft is asked for, read without peft and with its meaning of every pattern."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mindspeed_llm.errors import InputError

FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"
UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "enable_lora", "kasa_config", "layer_replication", "lora_bias",
    "megatron_config", "monteclora_config", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Settings of peft that change what the adapter computes in ways a pair of factors does not express."""
HARMLESS = (
    "auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode", "layers_pattern", "loftq_config",
    "lora_ga_config", "megatron_core", "merge_weights", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
)  # fmt: skip
"""Settings that say how training went, or how the file is to be loaded."""
CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")
"""Values of `init_lora_weights` under which training subtracted something from the base's weights."""


@dataclass(frozen=True)
class PeftConfig:
    """The part of peft's LoraConfig that decides what an adapter computes; names are peft's.

    Attributes:
        path: the file, for errors.
    """

    path: Path
    r: int = 8
    lora_alpha: float = 8
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    lora_dropout: float = 0.0
    init_lora_weights: bool | str | None = True
    modules_to_save: tuple[str, ...] | None = None
    target_parameters: tuple[str, ...] | None = None
    trainable_token_indices: tuple[int, ...] | Mapping[str, Any] | None = None
    ensure_weight_tying: bool = False
    base_model_name_or_path: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "PeftConfig":
        """The config of a PEFT folder.

        Raises:
            InputError: no such file, not LoRA, or a setting whose effect would be lost.
        """
        path = folder / FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); a PEFT adapter holds one") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid JSON ({error}); copy the adapter again") from error
        if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
            kind = raw.get("peft_type") if isinstance(raw, dict) else type(raw).__name__
            raise InputError(f"{path}: peft_type is {kind!r}; only LORA adapters can be read")
        known = {one.name for one in fields(cls)} - {"path"}
        lost = sorted(key for key, value in raw.items() if key not in known and key not in HARMLESS and value)
        if lost:
            reason = "changes" if lost[0] in UNSUPPORTED else "is unknown here and may change"
            raise InputError(
                f"{path}: {lost[0]} is {raw[lost[0]]!r:.60}, which {reason} what the adapter computes; merge this"
                " adapter with peft and convert the result"
            )
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items() if key in known}
        config = cls(path, **{key: value for key, value in values.items() if value is not None})
        config.check()
        return config

    def check(self) -> None:
        """`InputError` for values that cannot be, and for an adapter that belongs to a changed base."""
        for name, value in (("r", self.r), *(self.rank_pattern or {}).items()):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{self.path}: rank {name} is {value!r}, expected a positive integer")
        for name, value in (("lora_alpha", self.lora_alpha), *(self.alpha_pattern or {}).items()):
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise InputError(f"{self.path}: alpha {name} is {value!r}, expected a number")
        start = self.init_lora_weights
        if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
            raise InputError(
                f"{self.path}: init_lora_weights is {start!r}: the adapter belongs to a base that training changed;"
                " save it by peft's save_pretrained(..., path_initial_model_for_weight_conversion=...) first"
            )

    def rank(self, module: str) -> int:
        """Rank of an HF module."""
        return int((self.rank_pattern or {}).get(self.pattern_of(self.rank_pattern, module), self.r))

    def scaling(self, module: str) -> float:
        """The factor of B @ A of an HF module: alpha / r, or alpha / sqrt(r) with use_rslora."""
        alpha = (self.alpha_pattern or {}).get(self.pattern_of(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def pattern_of(self, patterns: Mapping[str, Any] | None, module: str) -> str:
        """The first pattern, a regular expression of the name's end, that fits a module; the module if none does."""
        return next((key for key in patterns or {} if self.match(rf"(.*\.)?({key})$", module)), module)

    def match(self, pattern: str, module: str, whole: bool = False) -> re.Match[str] | None:
        """`re.match` or `re.fullmatch`; `InputError` for a pattern that is no regular expression."""
        try:
            return re.fullmatch(pattern, module) if whole else re.match(pattern, module)
        except re.error as error:
            raise InputError(f"{self.path}: {pattern!r} is not a regular expression ({error})") from error

    def targets(self, module: str, linear: bool) -> bool:
        """Whether peft adapts an HF module of this name.

        Args:
            module: as in the model, `model.layers.0.self_attn.q_proj`.
            linear: whether it is a linear layer other than the output layer, which `all-linear` stands for.
        """
        if self.excludes(module) or self.target_modules is None:
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == ALL_LINEAR:
                return linear
            return bool(self.match(self.target_modules, module, whole=True))
        if module in self.target_modules:
            return True
        return module.endswith(tuple(f".{name}" for name in self.target_modules)) and self.transforms_layer(module)

    def excludes(self, module: str) -> bool:
        """Whether exclude_modules or modules_to_save take a module from the targets."""
        excluded = self.exclude_modules or ()
        if isinstance(excluded, str) and self.match(excluded, module, whole=True):
            return True
        if not isinstance(excluded, str) and any(module == one or module.endswith(f".{one}") for one in excluded):
            return True
        return any(self.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in self.modules_to_save or ())

    def transforms_layer(self, module: str) -> bool:
        """Whether layers_to_transform, where given, names the module's layer."""
        layers = self.layers_to_transform
        if layers is None or layers == ():
            return True
        patterns = self.layers_pattern or (r"[^.]*",)
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            found = self.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", module)
            if found:
                return int(found["layer"]) in ((layers,) if isinstance(layers, int) else layers)
        return False

    def saves(self, module: str) -> bool:
        """Whether modules_to_save makes a copy of an HF module of this name."""
        return any(module.endswith(saved) for saved in self.modules_to_save or ())

    def targets_parameter(self, parameter: str) -> bool:
        """Whether target_parameters names a parameter (`model.layers.0.mlp.experts.gate_up_proj`)."""
        return any(parameter == one or parameter.endswith(f".{one}") for one in self.target_parameters or ())
