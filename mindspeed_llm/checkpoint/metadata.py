"""`args.json`: what a checkpoint says about itself, beside its rank files.

Upstream stores the user's command line in a pickle and asks for everything else again; here the model, the layout,
the base and the adapter's settings are recorded, so that they need not be typed and cannot be mistyped.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_llm.checkpoint.atomic import write_text
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig

FILE = "args.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter was trained with. It is scaled by `alpha / r`; modules by megatron-core's short names."""

    r: int
    alpha: float
    target_modules: tuple[str, ...]
    dropout: float = 0.0

    @property
    def scaling(self) -> float:
        """The factor of B @ A."""
        return self.alpha / self.r


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
                lora = dict(rest["lora"])
                rest["lora"] = LoraSettings(**{**lora, "target_modules": tuple(lora["target_modules"])})
            return cls(**rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where}: does not describe a checkpoint ({type(error).__name__}: {error})") from error


def read_metadata(folder: str | Path) -> Metadata | None:
    """The metadata of an iteration folder; None where the checkpoint was written by another program."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); the checkpoint is damaged") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}, expected an object")
    return Metadata.from_dict(values, str(path))


def write_metadata(folder: str | Path, metadata: Metadata) -> None:
    """Write `args.json` atomically."""
    write_text(Path(folder) / FILE, json.dumps(metadata.to_dict(), indent=2, ensure_ascii=False) + "\n")
