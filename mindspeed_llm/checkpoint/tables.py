"""Names: the weight table of one model, unrolled over its layers, and looked up from any side.

*Logical names* are megatron-core's with the global layer number. A LoRA factor of `X.weight` is `X.lora_A.weight` or
`X.lora_B.weight`, without the adapter name and without `base_layer`, whatever file or live model it lies in; so are
the factors an adapter started from (`X.lora_A_start.weight`) and DoRA's lengths (`X.lora_magnitude_vector.weight`).
"""

import itertools
import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from mindspeed_llm.checkpoint.kinds import AxisMap, adapter_map, hf_map, shard_map
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families import family
from mindspeed_llm.models.families.base import Kind, Stacked, Weight

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
LAYER_NUMBER = re.compile(r"(?<=decoder\.layers\.)\d+")
EXPERT_NUMBER = re.compile(r"(?<=\.local_experts\.)\d+")
MAGNITUDE = "lora_magnitude_vector"
LORA_TENSOR = rf"lora_[AB](?:_start)?|{MAGNITUDE}"
"""A and B; those PiSSA began with, which are taken out of the base; DoRA's lengths of output rows."""
LORA_NAME = re.compile(rf"^(?P<module>.+)\.(?P<factor>{LORA_TENSOR})\.weight$")
WRAPPERS = re.compile(r"^(?:module\.|base_model\.model\.|base_model\.)+")


class HfPart(NamedTuple):
    """Where the HF side of a logical tensor lies: a tensor, or one expert's place in one that holds all experts.

    Attributes:
        name: of the HF tensor.
        expert: place along its first dimension; None when the tensor is this part alone.
        transposed: that place holds the part transposed.
    """

    name: str
    expert: int | None = None
    transposed: bool = False

    def __str__(self) -> str:
        """For people and for hashes: "experts.down_proj[3]"."""
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"


@dataclass(frozen=True)
class Entry:
    """One logical tensor of one model.

    Attributes:
        name: logical name.
        hf: the HF tensors it is made of.
        row: its row of the family's table.
        shape: logical shape.
        config: the model.
        layer: global number of its layer, prediction layers counted on from `num_layers`; None outside layers.
        expert: global number of the expert it belongs to; None outside experts.
    """

    name: str
    hf: tuple[HfPart, ...]
    row: Weight
    shape: tuple[int, ...]
    config: ModelConfig
    layer: int | None = None
    expert: int | None = None

    @property
    def kind(self) -> Kind:
        """How tensor parallelism cuts it."""
        return self.row.kind

    def hf_map(self) -> AxisMap:
        """How it is made of its HF tensors."""
        return hf_map(self.row.joined, self.config, self.shape[0])

    def hf_shape(self, part: int) -> tuple[int, ...]:
        """Shape of its HF part number `part`, before any stacking of experts."""
        return (self.hf_map().part_size(part), *self.shape[1:])

    def stored_shape(self, part: int) -> tuple[int, ...]:
        """Shape of the whole HF tensor that holds part number `part`."""
        shape = self.hf_shape(part)
        if self.row.stacked is Stacked.NO:
            return shape
        return (self.config.num_experts, *(shape[::-1] if self.row.stacked is Stacked.TRANSPOSED else shape))

    def shard_map(self, tp: int, padded_rows: int | None = None) -> AxisMap:
        """How `tp` ranks (expert-tensor-parallel ones for an expert) share it; `UsageError` when it does not divide."""
        return shard_map(self.name, self.kind, self.config, self.shape, tp, padded_rows)


class WeightTable:
    """The weight table of one model."""

    def __init__(self, config: ModelConfig) -> None:
        """Unroll the family's table over the layers and experts of `config`."""
        self.config = config
        self.sizes = config.dimensions()
        self.entries: dict[str, Entry] = {}
        before: list[Weight] = []
        after: list[Weight] = []
        layer_rows: list[Weight] = []
        prediction_rows: list[Weight] = []
        for row in family(config.family).weights:
            if "{mtp}" in row.name:
                prediction_rows.append(row)
            elif "{layer}" in row.name:
                layer_rows.append(row)
            else:
                (after if layer_rows else before).append(row)
        self.unroll(before, None)
        for layer in range(config.num_layers):
            self.unroll(layer_rows, layer)
        for layer in range(config.mtp_num_layers):
            self.unroll(prediction_rows, config.num_layers + layer)
        self.unroll(after, None)

    def unroll(self, rows: list[Weight], layer: int | None) -> None:
        """Add the rows that hold for one layer; consecutive rows of experts go expert by expert."""
        rows = [row for row in rows if all(self.config.has(feature, layer) for feature in row.when)]
        for of_experts, group in itertools.groupby(rows, key=lambda row: "{expert}" in row.name):
            group = list(group)
            for expert in range(self.config.num_experts) if of_experts else (None,):
                for row in group:
                    self.add(row, layer, expert)

    def add(self, row: Weight, layer: int | None, expert: int | None) -> None:
        """Add one entry."""
        numbers = {"layer": layer, "expert": expert}
        if layer is not None:
            numbers["mtp"] = layer - self.config.num_layers
        stacked = None if row.stacked is Stacked.NO else expert
        hf = tuple(HfPart(name.format(**numbers), stacked, row.stacked is Stacked.TRANSPOSED) for name in row.hf)
        shape = tuple(self.sizes[dimension] for dimension in row.shape)
        name = row.name.format(**numbers)
        self.entries[name] = Entry(name, hf, row, shape, self.config, layer, expert)

    @cached_property
    def of_layer(self) -> dict[int | None, list[Entry]]:
        """The entries of each layer, and under None those outside layers, in the order of the network."""
        found: dict[int | None, list[Entry]] = {}
        for entry in self.entries.values():
            found.setdefault(entry.layer, []).append(entry)
        return found

    @cached_property
    def hf_names(self) -> dict[str, tuple[Entry, int]]:
        """HF tensor name -> one entry and part that lies in it, in the order of the network."""
        return {hf.name: (entry, part) for entry in self.entries.values() for part, hf in enumerate(entry.hf)}

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
        if match["factor"] == MAGNITUDE:
            return (out_features,)
        return (rank, in_features) if match["factor"].startswith("lora_A") else (out_features, rank)

    def shard_map(self, name: str, tp: int, padded_rows: int | None = None) -> AxisMap:
        """How `tp` ranks share a base tensor or a LoRA factor."""
        match = LORA_NAME.match(name)
        if not match:
            return self.entry(name).shard_map(tp, padded_rows)
        base = self.entry(match["module"] + ".weight").shard_map(tp, padded_rows)
        return adapter_map(base, match["factor"])


def logical_name(local_name: str, first_layer: int = 0, adapter: str = "default", first_expert: int = 0) -> str:
    """The logical name of a parameter or file key.

    Strips wrappers (`module.`, peft's `base_model.model.`), `.base_layer` and the adapter's name, and turns the rank's
    own layer and expert numbers into the global ones.

    Args:
        local_name: as `named_parameters()` or a rank file spells it.
        first_layer: global number of the stage's layer 0.
        adapter: peft's adapter name.
        first_expert: global number of the rank's expert 0.
    """
    name = WRAPPERS.sub("", local_name).replace(".base_layer.", ".")
    name = re.sub(rf"\.({LORA_TENSOR})\.{re.escape(adapter)}\.", r".\1.", name)
    name = EXPERT_NUMBER.sub(lambda match: str(int(match[0]) + first_expert), name)
    return LAYER_NUMBER.sub(lambda match: str(int(match[0]) + first_layer), name)


def expert_number(name: str) -> int | None:
    """The expert a logical name belongs to; None outside experts."""
    match = EXPERT_NUMBER.search(name)
    return int(match[0]) if match else None


def is_lora(name: str) -> bool:
    """Whether a logical name is that of a LoRA factor, or of DoRA's lengths."""
    return LORA_NAME.match(name) is not None


def file_key(name: str, first_layer: int, wrapped: bool = False, adapter: str = "default") -> str:
    """The key a logical tensor has in a rank file: the inverse of `logical_name`.

    Args:
        first_layer: global number of the stage's layer 0.
        wrapped: the tensor is the base weight of a LoRA target (`.base_layer` is added).
    """
    name = LAYER_NUMBER.sub(lambda match: str(int(match[0]) - first_layer), name)
    if is_lora(name):
        return re.sub(rf"\.({LORA_TENSOR})\.weight$", rf".\1.{adapter}.weight", name)
    return re.sub(r"\.(weight|bias)$", r".base_layer.\1", name) if wrapped else name
