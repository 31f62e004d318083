"""`args.json`: what a checkpoint says about itself, beside its rank files.

Upstream stores the user's command line in a pickle and asks for everything else again; here the model, the layout,
the base and the adapter's settings are recorded, so that they need not be typed and cannot be mistyped.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from mindspeed_llm.checkpoint.atomic import write_text
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.hf_config import wrong_type

FILE = "args.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter was trained with: W + alpha / r * B @ A, per module.

    Attributes:
        r: rank of modules that `rank_pattern` does not name.
        alpha: of modules that `alpha_pattern` does not name.
        target_modules: megatron-core's short names (`linear_qkv`: in every layer), or whole logical names
            (`decoder.layers.3.mlp.linear_fc1`) where not every layer is adapted.
        dropout: on the adapters' input while training.
        rank_pattern: whole logical or short module name -> rank; a whole name wins.
        alpha_pattern: the same for alpha.
        use_rslora: the factor is alpha / sqrt(r).
        use_dora: rows of the sum have trained lengths.
        init: "default", or "pissa": the factors it started with are taken out of the base, and saved with it.
        dtype: of the trained factors, "float32" or "bfloat16"; "auto": the base's.
        modules_to_save: short or whole logical names of modules that are trained whole.
        parts: short or whole module name -> the HF projections of that fused layer that are adapted (q_proj, v_proj),
            where not all of them are; a whole name wins.
    """

    r: int
    alpha: float
    target_modules: tuple[str, ...]
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "default"
    dtype: str = "auto"
    modules_to_save: tuple[str, ...] = ()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def rank(self, module: str) -> int:
        """Rank of a module, named logically in whole (`decoder.layers.0.mlp.linear_fc1`)."""
        return self.rank_pattern.get(module, self.rank_pattern.get(short_name(module), self.r))

    def alpha_of(self, module: str) -> float:
        """Alpha of a module, named logically in whole."""
        return self.alpha_pattern.get(module, self.alpha_pattern.get(short_name(module), self.alpha))

    def scaling(self, module: str) -> float:
        """The factor of B @ A of a module, named logically in whole."""
        rank = self.rank(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def parts_of(self, module: str) -> tuple[str, ...] | None:
        """HF names of the parts of a module, named logically in whole, that are adapted; None for all."""
        return self.parts.get(module, self.parts.get(short_name(module)))

    def adapts(self, module: str) -> bool:
        """Whether a module, named logically in whole, is a target."""
        return module in self.target_modules or short_name(module) in self.target_modules

    def saves(self, module: str) -> bool:
        """Whether a module, named logically in whole, is trained whole."""
        return module in self.modules_to_save or short_name(module) in self.modules_to_save

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoraSettings":
        """The settings as args.json has them; those written before there were patterns have none."""
        lists = {key: tuple(values.get(key, ())) for key in ("target_modules", "modules_to_save")}
        parts = {module: tuple(names) for module, names in values.get("parts", {}).items()}
        return cls(**{**values, **lists, "parts": parts})


def short_name(module: str) -> str:
    """megatron-core's own name of a module: `linear_fc1` of `decoder.layers.0.mlp.linear_fc1`."""
    return module.rpartition(".")[2]


@dataclass(frozen=True)
class BaseRecord:
    """The model a checkpoint was made from: where it lay, and its content hash (None when it was not computed)."""

    path: str
    hash: str | None


@dataclass(frozen=True)
class Metadata:
    """The content of `args.json`.

    Attributes:
        model: dimensions, and HF's config.json.
        layout: of the rank files beside it.
        iteration: training step; 1 for a conversion.
        content_hash: of the base weights in this checkpoint; None when it holds none or they were not hashed.
        base: the HF folder of a conversion, or the model an adapter belongs to.
        lora: settings of the adapter in this checkpoint; None without one.
        template: prompt template of the training data.
        enable_thinking: thinking mode of the training data.
        options: every option of the run that wrote it, for people.
    """

    model: ModelConfig
    layout: Layout
    iteration: int = 1
    content_hash: str | None = None
    base: BaseRecord | None = None
    lora: LoraSettings | None = None
    template: str | None = None
    enable_thinking: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> "Metadata":
        """The metadata written by `to_dict`; `InputError` for another version or missing fields."""
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(f"{where}: format version {version!r}, this program reads {FORMAT_VERSION}; update it")
        try:
            rest = {key: value for key, value in values.items() if key != "format_version"}
            rest["model"] = ModelConfig.from_dict(values["model"], where)
            rest["layout"] = Layout.from_dict(values["layout"])
            if rest.get("base"):
                rest["base"] = BaseRecord(**rest["base"])
            if rest.get("lora"):
                rest["lora"] = LoraSettings.from_dict(rest["lora"])
            check_fields(rest.get("base"))
            check_fields(rest.get("lora"))
            found = cls(**rest)
            check_fields(found)
            return found
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{where}: does not describe a checkpoint ({type(error).__name__}: {error})") from error


def check_fields(record: Any) -> None:
    """`ValueError` naming a field of a dataclass whose value is not of the type it is declared with."""
    for one in fields(record) if is_dataclass(record) else ():
        value = getattr(record, one.name)
        if not is_dataclass(value) and (expected := wrong_type(one.type, value)):
            raise ValueError(f"{one.name} is {value!r:.60}, expected {expected}")
    if isinstance(record, LoraSettings) and record.r < 1:
        raise ValueError(f"r is {record.r}, expected a positive integer")


def read_metadata(folder: str | Path) -> Metadata | None:
    """The metadata of an iteration folder; None where the checkpoint was written by another program."""
    path = Path(folder) / FILE
    if not os.path.lexists(path):
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); the checkpoint is damaged") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); the checkpoint is damaged") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}, expected an object")
    return Metadata.from_dict(values, str(path))


def write_metadata(folder: str | Path, metadata: Metadata) -> None:
    """Write `args.json` atomically."""
    write_text(Path(folder) / FILE, json.dumps(metadata.to_dict(), indent=2, ensure_ascii=False) + "\n")
