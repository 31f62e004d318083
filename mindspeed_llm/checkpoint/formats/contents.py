"""What a training checkpoint holds, whichever files it lies in: a base, an adapter, or both."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.checkpoint.tables import WeightTable, is_lora
from mindspeed_llm.errors import InputError


class Contents:
    """The names in an opened checkpoint.

    Attributes:
        folder: its iteration folder.
        table: of its model.
        tensors: what it holds, by logical name.
    """

    folder: Path
    table: WeightTable
    tensors: Mapping[str, object]

    @property
    def lora_names(self) -> list[str]:
        """Logical names of the LoRA factors in this checkpoint."""
        return [name for name in self.tensors if is_lora(name)]

    @cached_property
    def missing_base(self) -> list[str]:
        """Base tensors of the table that this checkpoint does not hold."""
        return [name for name in self.table.entries if name not in self.tensors]

    def base_names(self) -> Iterable[str]:
        """Logical names of the base weights; `InputError` when some are missing."""
        if self.missing_base:
            kind = "a LoRA adapter without its base" if self.lora_names else "an incomplete model"
            raise InputError(
                f"{self.folder}: {kind}: {len(self.missing_base)} tensors are missing, first {self.missing_base[0]};"
                " give the base model's folder instead"
            )
        return self.table.entries

    def adapter_names(self, settings: LoraSettings | None) -> list[str]:
        """The LoRA factors, and before them what is trained whole by `settings`; `InputError` without factors."""
        if not self.lora_names:
            raise InputError(f"{self.folder}: holds no LoRA weights; give the folder that LoRA training saved")
        saved = [name for name in self.tensors if settings and settings.saves(name.removesuffix(".weight"))]
        return [*saved, *self.lora_names]
