"""Names: the weight table of one model, unrolled over its layers, and looked up from any side.

*Logical names* are megatron-core's with the global layer number. A LoRA factor of `X.weight` is `X.lora_A.weight` or
`X.lora_B.weight`, without the adapter name and without `base_layer`, whatever file or live model it lies in.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from mindspeed_llm.checkpoint.kinds import AxisMap, adapter_map, hf_map, shard_map
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families import family
from mindspeed_llm.models.families.base import Kind, Weight

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
LAYER_NUMBER = re.compile(r"(?<=decoder\.layers\.)\d+")
LORA_NAME = re.compile(r"^(?P<module>.+)\.(?P<factor>lora_[AB])\.weight$")
WRAPPERS = re.compile(r"^(?:module\.|base_model\.model\.|base_model\.)+")


@dataclass(frozen=True)
class Entry:
    """One logical tensor of one model.

    Attributes:
        name: logical name.
        hf: names of its HF tensors.
        kind: its relation to them and to tensor parallelism.
        shape: logical shape.
        config: the model.
    """

    name: str
    hf: tuple[str, ...]
    kind: Kind
    shape: tuple[int, ...]
    config: ModelConfig

    def hf_map(self) -> AxisMap:
        """How it is made of its HF tensors."""
        return hf_map(self.kind, self.config, self.shape[0])

    def hf_shape(self, part: int) -> tuple[int, ...]:
        """Shape of its HF tensor number `part`."""
        return (self.hf_map().part_size(part), *self.shape[1:])

    def shard_map(self, tp: int, padded_rows: int | None = None) -> AxisMap:
        """How `tp` ranks share it; `UsageError` when it does not divide."""
        return shard_map(self.name, self.kind, self.config, self.shape, tp, padded_rows)


class WeightTable:
    """The weight table of one model."""

    def __init__(self, config: ModelConfig) -> None:
        """Unroll the family's table over the layers of `config`."""
        self.config = config
        sizes = config.dimensions()
        self.entries: dict[str, Entry] = {}
        rows = [row for row in family(config.family).weights if applies(row, config)]
        first_layer_row = next(i for i, row in enumerate(rows) if "{layer}" in row.name)
        per_layer = [row for row in rows if "{layer}" in row.name]
        others = [row for row in rows if "{layer}" not in row.name]
        ordered = [(row, 0) for row in others[:first_layer_row]]
        ordered += [(row, layer) for layer in range(config.num_layers) for row in per_layer]
        ordered += [(row, 0) for row in others[first_layer_row:]]
        for row, layer in ordered:
            hf = tuple(name.format(layer=layer) for name in row.hf)
            shape = tuple(sizes[dimension] for dimension in row.shape)
            name = row.name.format(layer=layer)
            self.entries[name] = Entry(name, hf, row.kind, shape, config)

    @cached_property
    def of_hf(self) -> dict[str, tuple[Entry, int]]:
        """HF name -> (entry, which of its HF tensors)."""
        return {hf: (entry, part) for entry in self.entries.values() for part, hf in enumerate(entry.hf)}

    def resolve(self, name: str) -> str:
        """The name a tensor is stored under: a tied output layer is the embedding."""
        return EMBEDDING if name == OUTPUT_LAYER and self.config.tie_word_embeddings else name

    def entry(self, name: str) -> Entry:
        """The entry of a base tensor (a tied output layer gives the embedding's); `InputError` when there is none."""
        found = self.entries.get(self.resolve(name))
        if found is None:
            raise InputError(
                f"{name}: a {self.config.family} model of {self.config.num_layers} layers has no such tensor"
            )
        return found

    def shape(self, name: str, rank: int | None = None) -> tuple[int, ...]:
        """Logical shape of a base tensor or, with the LoRA rank `rank`, of a LoRA factor."""
        match = LORA_NAME.match(name)
        if not match:
            return self.entry(name).shape
        if rank is None:
            raise InputError(f"{name}: the shape of a LoRA factor needs the rank")
        out_features, in_features = self.entry(match["module"] + ".weight").shape
        return (rank, in_features) if match["factor"] == "lora_A" else (out_features, rank)

    def shard_map(self, name: str, tp: int, padded_rows: int | None = None) -> AxisMap:
        """How `tp` ranks share a base tensor or a LoRA factor."""
        match = LORA_NAME.match(name)
        if not match:
            return self.entry(name).shard_map(tp, padded_rows)
        base = self.entry(match["module"] + ".weight").shard_map(tp, padded_rows)
        return adapter_map(base, match["factor"])


def applies(row: Weight, config: ModelConfig) -> bool:
    """Whether a row's condition holds for this model."""
    if not row.when:
        return True
    value = bool(getattr(config, row.when.lstrip("!")))
    return value != row.when.startswith("!")


def logical_name(local_name: str, first_layer: int = 0, adapter: str = "default") -> str:
    """The logical name of a parameter or file key.

    Strips wrappers (`module.`, peft's `base_model.model.`), `.base_layer` and the adapter's name, and turns the stage's
    own layer number into the global one.

    Args:
        local_name: as `named_parameters()` or a rank file spells it.
        first_layer: global number of the stage's layer 0.
        adapter: peft's adapter name.
    """
    name = WRAPPERS.sub("", local_name).replace(".base_layer.", ".")
    name = re.sub(rf"\.(lora_[AB])\.{re.escape(adapter)}\.", r".\1.", name)
    return LAYER_NUMBER.sub(lambda match: str(int(match[0]) + first_layer), name)


def is_lora(name: str) -> bool:
    """Whether a logical name is that of a LoRA factor."""
    return LORA_NAME.match(name) is not None


def file_key(name: str, first_layer: int, wrapped: bool = False, adapter: str = "default") -> str:
    """The key a logical tensor has in a rank file: the inverse of `logical_name`.

    Args:
        first_layer: global number of the stage's layer 0.
        wrapped: the tensor is the base weight of a LoRA target (`.base_layer` is added).
    """
    name = LAYER_NUMBER.sub(lambda match: str(int(match[0]) - first_layer), name)
    if is_lora(name):
        return re.sub(r"\.(lora_[AB])\.weight$", rf".\1.{adapter}.weight", name)
    return re.sub(r"\.(weight|bias)$", r".base_layer.\1", name) if wrapped else name
