"""The tensors of a PEFT folder, sorted by the HF module they adapt or replace."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mindspeed_llm.checkpoint.adapters.peft_config import FILE, PeftConfig
from mindspeed_llm.checkpoint.atomic import write_text
from mindspeed_llm.checkpoint.formats.bin_file import read_bin
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor
from mindspeed_llm.checkpoint.formats.safetensors_file import read_safetensors
from mindspeed_llm.checkpoint.metadata import BaseRecord
from mindspeed_llm.errors import InputError

SAFETENSORS = "adapter_model.safetensors"
BIN = "adapter_model.bin"
BASE_FILE = "mindspeed_llm_base.json"
FILES = (SAFETENSORS, FILE, BASE_FILE)
"""What an exported adapter consists of."""
"""Beside our exports: which base the adapter belongs to, by content; peft has no place for it."""
PREFIX = "base_model.model."
FACTOR_KEY = re.compile(
    r"^(?P<module>.+)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?P<weight>\.weight)?$"
)
TOKENS_KEY = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")
SAVED = re.compile(r"\.modules_to_save(?:\.[^.]+)?(?=\.(?:weight|bias)$)")


@dataclass
class PeftTensors:
    """The tensors of an adapter file, names as in the model, without peft's wrappers.

    Attributes:
        factors: HF module -> `lora_A`, `lora_B`, `lora_embedding_A`, ... -> tensor. Modules that wrap another one keep
            their `.base_layer`.
        whole: HF tensor name -> a tensor that replaces the base's.
        tokens: HF module -> the rows that replace those of trained tokens.
    """

    factors: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    whole: dict[str, LazyTensor] = field(default_factory=dict)
    tokens: dict[str, LazyTensor] = field(default_factory=dict)


def is_peft(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(folder) / FILE).is_file()


def read_tensors(folder: Path) -> PeftTensors:
    """Read the headers of an adapter's file.

    Raises:
        InputError: no file, a damaged one, or one with tensors of several adapters or of no known meaning.
    """
    if (folder / SAFETENSORS).is_file():
        path = folder / SAFETENSORS
        stored: Mapping[str, LazyTensor] = read_safetensors(path)
    elif (folder / BIN).is_file():
        path = folder / BIN
        stored = read_bin(path)
    else:
        raise InputError(f"{folder}: holds {FILE}, but neither {SAFETENSORS} nor {BIN}; copy the adapter again")
    found, adapters = PeftTensors(), set()
    for key, tensor in stored.items():
        name = key.removeprefix(PREFIX)
        if match := FACTOR_KEY.match(name):
            adapters.add(match["adapter"])
            own = found.factors.setdefault(match["module"], {})
            if match["factor"] in own:
                raise InputError(f"{path}: {match['module']} has {match['factor']} twice; one adapter a file is read")
            own[match["factor"]] = tensor
        elif match := TOKENS_KEY.match(name):
            found.tokens[match["module"]] = tensor
        elif name.endswith((".weight", ".bias")) and ".lora_" not in name:
            found.whole[SAVED.sub("", name).replace(".base_layer.", ".")] = tensor
        else:
            raise InputError(f"{path}: {key} is no tensor of a LoRA adapter that can be read here")
    if len(adapters) > 1:
        raise InputError(f"{path}: holds the adapters {', '.join(map(str, sorted(adapters, key=str)))}; save one alone")
    return found


def read_base_record(folder: Path, config: PeftConfig) -> BaseRecord | None:
    """The base an adapter was made for: with its content hash where we wrote the adapter; None when none is named."""
    path = folder / BASE_FILE
    if path.is_file():
        try:
            return BaseRecord(**json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise InputError(f"{path}: does not name a base ({error}); remove it to skip the check") from error
    return BaseRecord(config.base_model_name_or_path, None) if config.base_model_name_or_path else None


def write_base_record(folder: Path, record: BaseRecord) -> None:
    """Record the base beside an exported adapter."""
    write_text(folder / BASE_FILE, json.dumps({"path": record.path, "hash": record.hash}, indent=2) + "\n")
