"""An opened adapter, whatever it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mindspeed_llm.checkpoint.formats.lazy import Readable, TensorSource
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.formats.torch_dist_run import DistCheckpoint
from mindspeed_llm.checkpoint.metadata import BaseRecord, LoraSettings, Metadata
from mindspeed_llm.checkpoint.tables import EMBEDDING, LORA_NAME, MAGNITUDE, OUTPUT_LAYER
from mindspeed_llm.errors import InputError


@dataclass(frozen=True)
class LoraSource:
    """An adapter: its factors as logical tensors `X.lora_A.weight`, `X.lora_B.weight`, and its settings.

    Attributes:
        tensors: the factors, and under their own logical names whole tensors that replace the base's (`TensorSource`).
        settings: rank, alpha, targets.
        base: the model it was trained on, as far as the adapter records it.
        metadata: of its checkpoint; None when another program wrote it.
        checkpoint: the opened Megatron folder, which may hold base weights and optimizer state too; None otherwise.
        unties: the base ties its output layer to the embedding, but with this adapter the two differ.
        magnitudes: DoRA's length of each output row, by logical module; NaN for rows that DoRA leaves alone.
        stored: what training stores of it, where that is more than `tensors` show; None where it is not.
        stored_settings: those of `stored`.
    """

    tensors: TensorSource
    settings: LoraSettings
    base: BaseRecord | None
    metadata: Metadata | None
    checkpoint: MegatronCheckpoint | DistCheckpoint | None
    unties: bool = False
    magnitudes: Mapping[str, Readable] = field(default_factory=dict)
    stored: TensorSource | None = None
    stored_settings: LoraSettings | None = None

    @property
    def path(self) -> Path:
        """The adapter's folder, for errors."""
        return self.tensors.path

    @property
    def live(self) -> TensorSource:
        """The LoRA tensors of a live model, which training goes on with."""
        return self.stored or self.tensors

    @property
    def live_settings(self) -> LoraSettings:
        """The settings that `live` fits."""
        return self.stored_settings or self.settings

    def modules(self) -> list[str]:
        """The logical modules that have a pair of factors."""
        found = (LORA_NAME.match(name) for name in self.tensors.names())
        return list(dict.fromkeys(match["module"] for match in found if match))

    def whole(self) -> list[str]:
        """Logical names of the whole tensors that replace the base's."""
        return [name for name in self.tensors.names() if not LORA_NAME.match(name)]

    def obstacles(self) -> list[str]:
        """What training on from it, and a live model, cannot hold; empty when they hold everything."""
        ends, modules = (EMBEDDING, OUTPUT_LAYER), self.modules()
        held_as_one = self.tensors.config.tie_word_embeddings and not self.unties
        lost = [m for m in modules if f"{m}.weight" == OUTPUT_LAYER or (f"{m}.weight" == EMBEDDING and held_as_one)]
        names = self.whole()
        kept = [name for name in names if not (self.unties and name in ends)]
        saved = [name for name in kept if self.live_settings.saves(name.removesuffix(".weight"))]
        held = {name.removesuffix(f".{MAGNITUDE}.weight") for name in self.live.names()}
        return [
            *(f"the whole tensor {name}" for name in names if name not in saved),
            *(f"an adapter of {module}" for module in lost),
            *(f"the DoRA magnitude of {module}" for module in self.magnitudes if module not in held),
        ]

    def require_plain_factors(self, what: str) -> None:
        """`InputError` when the adapter is more than factors of linear layers.

        Args:
            what: what needs that, for the error: "a Megatron LoRA checkpoint".
        """
        whole = [f"the whole tensor {name}" for name in self.whole()]
        found = list(dict.fromkeys([*whole, *self.obstacles()]))
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise InputError(
                f"{self.path}: {what} cannot hold {found[0]}{more}; merge the adapter into its base instead"
            )
