"""What rank files call logical tensors, and how several of them share one file tensor.

The names are facts of the formats: upstream's converters and Megatron's own state dicts. Most differ from the logical
name by the layer's and the expert's local number only. The others:

    local, latent attention  linear_qkv.weight = q (down) rows above kv down rows, on every rank whole
    local, grouped experts   mlp.experts.weight1 = for each local expert its fc1 transposed; weight2 its fc2
    transformer_engine       a norm is named after the linear layer that follows; experts are .weight0, .weight1 ...
    prediction layers        mtp.final_layernorms.N, and the model's own norm is final_layernorm; an embedding of their
                             own on a last stage is the stage's embedding
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, TensorSource, element_count
from mindspeed_llm.checkpoint.kinds import AxisMap, whole_copies
from mindspeed_llm.checkpoint.layout import Layout, Rank, Slots
from mindspeed_llm.checkpoint.tables import (
    EMBEDDING,
    LAYER_NUMBER,
    LORA_NAME,
    LORA_TENSOR,
    MAGNITUDE,
    OUTPUT_LAYER,
    WRAPPERS,
    Entry,
    WeightTable,
    is_lora,
)

IMPLEMENTATIONS = ("local", "transformer_engine")
EXPERT_NUMBER = re.compile(r"(?<=\.local_experts\.)\d+")
EXPERT_WEIGHT = re.compile(r"\.mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$")
GROUPED_WEIGHT = re.compile(r"\.mlp\.experts\.weight([12])(?:_lora_([ab]))?$")
ENGINE_EXPERT = re.compile(r"\.mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")
JOINED = ".self_attention.linear_qkv.weight"
JOINED_FACTOR = re.compile(r"\.self_attention\.linear_qkv\.lora_([AB])\.weight$")
Q_DOWN = (".self_attention.linear_q_down_proj.weight", ".self_attention.linear_q_proj.weight")
KV_DOWN = ".self_attention.linear_kv_down_proj.weight"
PREDICTION_NORM = re.compile(r"^mtp\.layers\.(\d+)\.final_layernorm\.weight$")
PREDICTION_NORM_KEY = re.compile(r"^mtp\.final_layernorms\.(\d+)\.weight$")
FINAL_NORM = "decoder.final_layernorm.weight"
OWN_EMBEDDING = "mtp.layers.0.embed_tokens.weight"
ENGINE_NORMS = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
    (".self_attention.q_layernorm.weight", ".self_attention.linear_q_up_proj.layer_norm_weight"),
    (".self_attention.kv_layernorm.weight", ".self_attention.linear_kv_up_proj.layer_norm_weight"),
)


@dataclass(frozen=True)
class Dialect:
    """How a rank file is to be written.

    Attributes:
        implementation: whose names: "local" or "transformer_engine".
        grouped: the experts of a rank share tensors (`--moe-grouped-gemm`).
    """

    implementation: str = "local"
    grouped: bool = False


class Share(NamedTuple):
    """A rank's share of a logical tensor inside a file tensor.

    Attributes:
        name: logical name.
        axis: how the ranks share it.
        part: this rank's number among them.
        shape: of the share.
        offset: of its first element in the file tensor.
        transposed: it lies there transposed.
    """

    name: str
    axis: AxisMap
    part: int
    shape: tuple[int, ...]
    offset: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a rank file."""

    key: str
    shape: tuple[int, ...]
    shares: tuple[Share, ...]


def local_shape(shape: Sequence[int], axis: AxisMap, part: int) -> tuple[int, ...]:
    """Shape of one rank's share."""
    if axis.dim is None:
        return tuple(shape)
    return (*shape[: axis.dim], axis.part_size(part), *shape[axis.dim + 1 :])


def chunk_entries(table: WeightTable, layout: Layout, rank: Rank, vp_rank: int = 0) -> list[tuple[str, Entry]]:
    """(name, entry) of the logical tensors a rank stores in a chunk, in order.

    On a last stage of its own a tied model has an output layer too: the embedding under that name.
    """
    first, last = layout.is_first(rank.pp, vp_rank), layout.is_last(rank.pp, vp_rank)
    share = layout.expert_share(rank.tp, rank.ep, table.config.num_experts)
    layers: list[int | None] = [slot for slot in layout.slots(rank.pp, vp_rank) if slot is not None]
    if last:
        layers += range(table.config.num_layers, table.config.num_layers + table.config.mtp_num_layers)
    outside = table.of_layer[None]
    found = [entry for entry in outside if entry.name == EMBEDDING] if first else []
    for layer in layers:
        found += table.of_layer[layer]
    if last:
        found += [entry for entry in outside if entry.name != EMBEDDING]
    held = range(share.first, share.first + share.count)
    named = [(entry.name, entry) for entry in found if entry.expert is None or entry.expert in held]
    if last and not first and table.config.tie_word_embeddings:
        named.append((OUTPUT_LAYER, table.entry(EMBEDDING)))
    return named


def file_tensors(
    table: WeightTable, layout: Layout, rank: Rank, vp_rank: int, dialect: Dialect, padded_rows: int | None
) -> list[FileTensor]:
    """The tensors of one chunk of one rank file."""
    names = FileNames(table, layout, rank, vp_rank, dialect)
    groups: dict[str, list[Share]] = {}
    for name, entry in chunk_entries(table, layout, rank, vp_rank):
        key, whole = names.key(name, entry)
        parts = layout.tp if entry.expert is None else layout.etp
        part = rank.tp if entry.expert is None else names.experts.part
        axis = whole_copies(parts) if whole else table.shard_map(name, parts, padded_rows)
        groups.setdefault(key, []).append(Share(name, axis, part, local_shape(entry.shape, axis, part)))
    return [joined(key, shares) for key, shares in groups.items()]


def factor_tensors(source: TensorSource, layout: Layout, rank: Rank, vp_rank: int) -> list[FileTensor]:
    """The LoRA factors of one chunk of one rank file, which have names of their own in either dialect."""
    table, names = source.table, FileNames(source.table, layout, rank, vp_rank)
    held = {name for name, _ in chunk_entries(table, layout, rank, vp_rank)}
    found = []
    for name in source.names():
        entry = table.entry(LORA_NAME.match(name)["module"] + ".weight")
        if entry.name not in held:
            continue
        parts = layout.tp if entry.expert is None else layout.etp
        part = rank.tp if entry.expert is None else names.experts.part
        axis = table.shard_map(name, parts)
        shape = local_shape(source.shape(name), axis, part)
        found.append(FileTensor(names.key(name, entry)[0], shape, (Share(name, axis, part, shape),)))
    return found


def joined(key: str, shares: list[Share]) -> FileTensor:
    """The file tensor that holds these shares one after the other."""
    grouped = GROUPED_WEIGHT.search(key)
    if not grouped and len(shares) == 1:
        return FileTensor(key, shares[0].shape, tuple(shares))
    placed, offset = [], 0
    for share in shares:
        placed.append(share._replace(offset=offset, transposed=bool(grouped)))
        offset += element_count(share.shape)
    rows, columns = shares[0].shape
    if not grouped:
        shape = (offset // columns, columns)
    else:
        shape = (columns, offset // columns) if grouped[1] == "1" else (offset // rows, rows)
    return FileTensor(key, shape, tuple(placed))


class FileNames:
    """Names of one chunk of one rank file, in both directions."""

    def __init__(
        self, table: WeightTable, layout: Layout, rank: Rank, vp_rank: int, dialect: Dialect | None = None
    ) -> None:
        """Names of the chunk `vp_rank` of `rank`; `dialect` matters for writing only."""
        self.table = table
        self.dialect = dialect or Dialect()
        self.slots: Slots = layout.slots(rank.pp, vp_rank)
        self.local = {layer: number for number, layer in enumerate(self.slots) if layer is not None}
        self.experts = layout.expert_share(rank.tp, rank.ep, table.config.num_experts)
        self.first = layout.is_first(rank.pp, vp_rank)

    def key(self, name: str, entry: Entry) -> tuple[str, bool]:
        """(file key, whether every rank holds all of it whatever its kind says)."""
        key = LAYER_NUMBER.sub(lambda match: str(self.local[int(match[0])]), name)
        if is_lora(key):
            return self.local_expert(re.sub(rf"\.({LORA_TENSOR})\.weight$", r".\1.default.weight", key)), False
        if name == OWN_EMBEDDING and not self.first:
            return EMBEDDING, False
        if name == FINAL_NORM and self.table.config.mtp_num_layers:
            return FINAL_NORM.removeprefix("decoder."), False
        key = PREDICTION_NORM.sub(r"mtp.final_layernorms.\1.weight", key)
        if entry.expert is not None:
            return self.expert_key(key), False
        if self.dialect.implementation == "local":
            for suffix in (*Q_DOWN, KV_DOWN) if self.table.config.multi_latent_attention else ():
                if key.endswith(suffix):
                    return key.removesuffix(suffix) + JOINED, True
            return key, False
        return self.engine_norm(key), False

    def local_expert(self, key: str) -> str:
        """The key with the expert's local number."""
        return EXPERT_NUMBER.sub(lambda match: str(int(match[0]) - self.experts.first), key)

    def expert_key(self, key: str) -> str:
        """The key of an expert's tensor."""
        key = self.local_expert(key)
        if self.dialect.implementation == "local":
            match = EXPERT_WEIGHT.search(key) if self.dialect.grouped else None
            return key if match is None else f"{key[: match.start()]}.mlp.experts.weight{match[2][-1]}"
        pattern = r"\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)$"
        return re.sub(pattern, r".\2.\3\1", key) if self.dialect.grouped else key

    def engine_norm(self, key: str) -> str:
        """The key under transformer_engine's names, where a norm belongs to the linear layer after it.

        The norm before the MLP keeps its name, as upstream's converter writes it; either is read.
        """
        latent = self.table.config.multi_latent_attention
        for ours, theirs in ENGINE_NORMS[2:] if latent else ENGINE_NORMS[:1]:
            if key.endswith(ours):
                return key.removesuffix(ours) + theirs
        return key

    def logical(self, key: str, tensor: LazyTensor) -> Iterator[tuple[str, LazyTensor, bool]]:
        """(logical name, its share, whether every rank holds all of it) of what one file tensor holds.

        Raises:
            KeyError: its layer's number is beyond the chunk's.
        """
        name = WRAPPERS.sub("", key).replace(".base_layer.", ".")
        name = re.sub(rf"\.({LORA_TENSOR})\.default\.", r".\1.", name)
        name = LAYER_NUMBER.sub(lambda match: str(self.global_layer(int(match[0]), key)), name)
        name = EXPERT_NUMBER.sub(lambda match: str(int(match[0]) + self.experts.first), name)
        if name == FINAL_NORM.removeprefix("decoder."):
            name = FINAL_NORM
        name = PREDICTION_NORM_KEY.sub(r"mtp.layers.\1.final_layernorm.weight", name)
        if name == EMBEDDING and not self.first:
            name = OWN_EMBEDDING if self.table.config.mtp_num_layers else name
        for ours, theirs in ENGINE_NORMS:
            if name.endswith(theirs):
                name = name.removesuffix(theirs) + ours
        if self.table.config.multi_latent_attention and name.endswith(JOINED):
            yield from self.split_latent(name.removesuffix(JOINED), tensor)
        elif self.table.config.multi_latent_attention and (match := JOINED_FACTOR.search(name)):
            yield from self.split_latent_factor(name[: match.start()], match[1], tensor)
        elif match := GROUPED_WEIGHT.search(name):
            yield from self.split_experts(name[: match.start()], match, tensor)
        elif match := ENGINE_EXPERT.search(name):
            expert = self.experts.first + int(match[3])
            yield f"{name[: match.start()]}.mlp.experts.local_experts.{expert}.{match[1]}.{match[2]}", tensor, False
        else:
            yield name, tensor, False

    def global_layer(self, number: int, key: str) -> int:
        """The global number of the chunk's layer `number`; `KeyError` when there is none."""
        layer = self.slots[number] if number < len(self.slots) else None
        if layer is None:
            raise KeyError(key)
        return layer

    def split_latent(self, prefix: str, tensor: LazyTensor) -> Iterator[tuple[str, LazyTensor, bool]]:
        """The q and kv rows of a joined down projection."""
        sizes, plain = self.table.sizes, not self.table.config.q_lora_rank
        q_rows = sizes["q_up"] if plain else sizes["q_lora"]
        yield prefix + Q_DOWN[plain], tensor.row_slice(0, q_rows), True
        yield prefix + KV_DOWN, tensor.row_slice(q_rows, tensor.shape[0]), True

    def split_latent_factor(
        self, prefix: str, factor: str, tensor: LazyTensor
    ) -> Iterator[tuple[str, LazyTensor, bool]]:
        """A LoRA factor of a joined down projection: both parts share A, and each has its rows of B."""
        for name, rows, whole in self.split_latent(prefix, tensor) if factor == "B" else ():
            yield name.removesuffix("weight") + "lora_B.weight", rows, whole
        for suffix in (Q_DOWN[not self.table.config.q_lora_rank], KV_DOWN) if factor == "A" else ():
            yield prefix + suffix.removesuffix("weight") + "lora_A.weight", tensor, True

    def split_experts(
        self, prefix: str, match: re.Match[str], tensor: LazyTensor
    ) -> Iterator[tuple[str, LazyTensor, bool]]:
        """The local experts of a grouped tensor, weight or LoRA factor: blocks [m, n] that lie one after the other.

        A block is the expert's tensor transposed, whatever shape the file gives the whole: [m, experts x n] for fc1,
        [experts x m, n] for fc2.
        """
        count = self.experts.count
        rows, columns = tensor.shape
        m, n = (rows, columns // count) if match[1] == "1" else (rows // count, columns)
        factor = f"lora_{match[2].upper()}.weight" if match[2] else "weight"
        for expert in range(count):
            offset = tensor.offset + expert * m * n * tensor.dtype.itemsize
            share = LazyTensor(tensor.path, offset, tensor.dtype, (n, m), (1, n))
            number = self.experts.first + expert
            yield f"{prefix}.mlp.experts.local_experts.{number}.linear_fc{match[1]}.{factor}", share, False


def lora_rank(name: str, shape: Sequence[int]) -> int:
    """The rank of a LoRA factor, whole or a share; 1 for DoRA's lengths, which have none."""
    factor = LORA_NAME.match(name)["factor"]
    if factor == MAGNITUDE:
        return 1
    return shape[0] if factor.startswith("lora_A") else shape[1]
