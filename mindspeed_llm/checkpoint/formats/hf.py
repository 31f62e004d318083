"""Hugging Face model folders: config.json and weights, read in any stored form and written as plain safetensors."""

import dataclasses
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from mindspeed_llm.checkpoint.atomic import write_text
from mindspeed_llm.checkpoint.formats.blocks import Progress, copy_part, no_progress, row_blocks
from mindspeed_llm.checkpoint.formats.hf_folder import INDEX, SINGLE, read_folder
from mindspeed_llm.checkpoint.formats.lazy import Readable, TensorSource, assemble, element_count, listed
from mindspeed_llm.checkpoint.formats.quantised import dequantised
from mindspeed_llm.checkpoint.formats.safetensors_file import SafetensorsWriter
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.tables import EMBEDDING, HfPart, WeightTable
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig

NOT_WEIGHTS = ("rotary_emb.inv_freq",)
"""Endings of tensors that older exports carry and that follow from the config."""
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
"""What belongs to a model besides its weights: config, tokenizer, chat template, generation config, remote code."""
NOT_COMPANIONS = ("args.json", "precision_report.json")
"""What we write about a model, which is not true of another one made from it."""
SHARD_BYTES = 5_000_000_000


class HFSource:
    """An HF folder as logical tensors (`TensorSource`).

    Attributes:
        notes: what was done to the weights that is not plain reading, one line each, for the program to say.
        known_hash: the content hash, once somebody asked for it (`open.source_hash`).
    """

    known_hash: str | None = None

    def __init__(self, folder: str | Path, ignore_unknown: bool = False) -> None:
        """Read config and headers, and hold them against the weight table.

        Args:
            ignore_unknown: tensors the table does not know are left out, and a note says so.

        Raises:
            InputError: files missing, truncated or outside the folder; tensors missing, stored twice, unknown, or of a
                wrong shape or type.
        """
        self.path = Path(folder)
        self.notes: list[str] = []
        config = ModelConfig.from_hf(self.path)
        settings = config.hf_config.get("quantization_config")
        self.tensors, note = dequantised(read_folder(self.path), settings, str(self.path))
        if note:
            self.notes.append(note)
        config = stored_predictions(config, self.tensors)
        self.table = WeightTable(config)
        self.check_names(ignore_unknown)
        self.check_types()
        # What the weights are wins over what config.json says they are: a cast must never happen unseen.
        stored = self.tensors[self.table.entry(EMBEDDING).hf[0].name].dtype
        self.config = dataclasses.replace(config, dtype=str(stored).removeprefix("torch."))
        self.table = WeightTable(self.config)

    def check_names(self, ignore_unknown: bool = False) -> None:
        """Every tensor of the table is there with its shape, and no other."""
        expected = self.table.hf_names
        extra = {name for name in self.tensors if name not in expected and not name.endswith(NOT_WEIGHTS)}
        if self.table.config.tie_word_embeddings:
            extra -= self.tied_copies(extra)
        missing = sorted(set(expected) - set(self.tensors))
        if extra and ignore_unknown:
            self.notes.append(f"{self.path}: {len(extra)} unknown tensors are left out: {listed(extra)}")
            extra = set()
        if missing or extra:
            wrong = [f"{len(missing)} tensors are missing {listed(missing)}"] if missing else []
            if extra:
                wrong.append(f"{len(extra)} are unknown to a {self.table.config.family} model {listed(extra)}")
                wrong.append("--ignore-unknown leaves them out")
            raise InputError(f"{self.path}: {'; '.join(wrong)}")
        for name, (entry, part) in expected.items():
            found, wanted = self.tensors[name].shape, entry.stored_shape(part)
            if found != wanted:
                raise InputError(f"{self.path}: {name} has shape {list(found)}, config.json asks for {list(wanted)}")

    def check_types(self) -> None:
        """The HF tensors of one logical tensor have one floating-point type."""
        for entry in self.table.entries.values():
            first = entry.hf[0].name
            for hf in entry.hf:
                found, wanted = self.tensors[hf.name].dtype, self.tensors[first].dtype
                if found != wanted:
                    raise InputError(
                        f"{self.path}: {hf.name} is {found}, {first} is {wanted}; they make up {entry.name} and need"
                        " one type"
                    )
                if not found.is_floating_point or found.itemsize < 2:
                    raise InputError(f"{self.path}: {hf.name} is {found}, expected bfloat16, float16 or float32")

    def tied_copies(self, extra: set[str]) -> set[str]:
        """Output layers of a tied model that are stored too; they have to equal the embedding."""
        embedding = self.tensors.get(self.table.entry(EMBEDDING).hf[0].name)
        copies = extra & {"lm_head.weight"}
        for name in copies:
            if embedding is not None and not same_values(self.tensors[name], embedding):
                raise InputError(
                    f"{self.path}: config.json ties {name} to the embedding, but the file holds other values for it;"
                    " set tie_word_embeddings to false or remove the tensor"
                )
        return copies

    def names(self) -> list[str]:
        """Logical names, in the order of the network."""
        return list(self.table.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        return self.table.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values in the file."""
        return self.tensors[self.table.entry(name).hf[0].name].dtype

    def read(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The logical tensor, or a box of it, joined from the HF tensors it is made of."""
        entry = self.table.entry(name)
        return assemble([self.part(hf) for hf in entry.hf], entry.hf_map(), rows, columns)

    def part(self, hf: HfPart) -> Readable:
        """The stored values of one HF part."""
        tensor = self.tensors[hf.name]
        return tensor if hf.expert is None else tensor.expert(hf.expert, hf.transposed)


def stored_predictions(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """The config without prediction layers where the folder has none of their tensors.

    transformers drops them when it saves a model, and leaves their number in config.json.
    """
    if not config.mtp_num_layers:
        return config
    of_layer = WeightTable(config).of_layer
    layers = range(config.num_layers, config.num_layers + config.mtp_num_layers)
    wanted = {hf.name for layer in layers for entry in of_layer.get(layer, []) for hf in entry.hf}
    return config if wanted & set(names) else dataclasses.replace(config, mtp_num_layers=0)


def same_values(one: Readable, other: Readable) -> bool:
    """Whether two tensors are equal, read block by block; the same place in the same file is not read at all."""
    if one == other:
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    blocks = row_blocks(one.shape, one.dtype.itemsize)
    return all(torch.equal(one.read([block]), other.read([block])) for block in blocks)


class Announced(Protocol):
    """What is known of a model before its values are."""

    table: WeightTable

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values a logical tensor will have."""
        ...


def plan_shards(source: Announced, shard_bytes: int) -> list[dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Type and shape of each HF tensor, by shard; a shard is closed before it would exceed `shard_bytes`."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for hf, (entry, part) in source.table.hf_names.items():
        dtype, shape = source.dtype(entry.name), entry.stored_shape(part)
        size = element_count(shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][hf] = (dtype, shape)
        filled += size
    return shards


def shard_files(count: int) -> list[str]:
    """File names of an HF folder's weights."""
    return [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


class HfFiles:
    """The weight files of an HF folder while they are written, by one process or by several that share the work.

    Every process plans the same files from the same announcement. One creates them before the others write.
    """

    def __init__(self, folder: Path, announced: Announced, shard_bytes: int, create: bool = True) -> None:
        """Plan the files.

        Args:
            folder: an existing folder, as a rule that of a `StagedDirectory`.
            announced: shapes and types of what will come.
            shard_bytes: limit of one file.
            create: lay the files out; False when another process does.
        """
        self.folder, self.create = folder, create
        self.shards = plan_shards(announced, shard_bytes)
        self.files = shard_files(len(self.shards))
        self.where = {name: number for number, tensors in enumerate(self.shards) for name in tensors}
        self.writers: dict[int, SafetensorsWriter] = {}
        for number in range(len(self.shards)) if create else ():
            self.writer(number)

    def writer(self, number: int) -> SafetensorsWriter:
        """The writer of one shard, opened on first use."""
        if number not in self.writers:
            path = self.folder / self.files[number]
            self.writers[number] = SafetensorsWriter(path, self.shards[number], self.create)
        return self.writers[number]

    def write(self, source: TensorSource, name: str, progress: Progress = no_progress) -> int:
        """Write the HF parts of one logical tensor, block by block; -> how many there are."""
        entry = source.table.entry(name)
        for part, hf in enumerate(entry.hf):
            place = self.writer(self.where[hf.name]).place(hf.name, hf.expert, hf.transposed)
            copy_part(source, name, entry.hf_map(), part, place, progress)
        return len(entry.hf)

    def close(self, whole: bool = True) -> None:
        """Make durable what was written; `InputError` when this process was to write the `whole` and did not."""
        for writer in self.writers.values():
            writer.close(whole)

    def write_index(self) -> None:
        """Write the index when there are several files."""
        if len(self.files) == 1:
            return
        sizes = [element_count(shape) * dtype.itemsize for one in self.shards for dtype, shape in one.values()]
        index = {
            "metadata": {"total_size": sum(sizes)},
            "weight_map": {name: self.files[number] for name, number in self.where.items()},
        }
        write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_hf(
    source: TensorSource,
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = no_progress,
) -> None:
    """Write the weights of an HF folder (safetensors, and the index when there are several shards).

    Args:
        folder: an existing folder, as a rule that of a `StagedDirectory`.
        shard_bytes: limit of one file.
        progress: told the bytes of each block written.
    """
    files = HfFiles(folder, source, shard_bytes)
    for name in source.names():
        files.write(source, name, progress)
    files.close()
    files.write_index()


def copy_companions(origin: Path, folder: Path, config: ModelConfig) -> list[str]:
    """Copy config, tokenizer, chat template and generation config.

    config.json says the type of the weights written, whether the output layer is the embedding (an adapter can end
    that), and nothing of a quantisation: they are written plain.

    Returns:
        Names of the files copied.
    """
    copied = []
    for pattern in COMPANIONS:
        for path in sorted(origin.glob(pattern)):
            if path.name.endswith(".index.json") or path.name in NOT_COMPANIONS or not path.is_file():
                continue
            shutil.copyfile(path, folder / path.name)
            copied.append(path.name)
    raw = json.loads((origin / "config.json").read_text(encoding="utf-8"))
    spelling = "torch_dtype" if "torch_dtype" in raw and "dtype" not in raw else "dtype"
    quantised = raw.pop("quantization_config", None)
    tied = ModelConfig.from_hf_dict(raw, str(origin / "config.json")).tie_word_embeddings
    if (raw.get(spelling), tied) != (config.dtype, config.tie_word_embeddings) or quantised is not None:
        raw[spelling] = config.dtype
        if tied != config.tie_word_embeddings:
            raw["tie_word_embeddings"] = config.tie_word_embeddings
        write_text(folder / "config.json", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
    return copied
