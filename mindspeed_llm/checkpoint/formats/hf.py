"""Hugging Face model folders: config.json and safetensors, in one file or in shards with an index."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from mindspeed_llm.checkpoint.atomic import write_text
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, TensorSource, assemble, element_count, narrow
from mindspeed_llm.checkpoint.formats.safetensors_file import SafetensorsWriter, read_safetensors
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.tables import EMBEDDING, HfPart, WeightTable
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NOT_WEIGHTS = ("rotary_emb.inv_freq",)
"""Endings of tensors that older exports carry and that follow from the config."""
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
"""What belongs to a model besides its weights: config, tokenizer, chat template, generation config, remote code."""
SHARD_BYTES = 5_000_000_000


class HFSource:
    """An HF folder as logical tensors (`TensorSource`)."""

    def __init__(self, folder: str | Path) -> None:
        """Read config and headers, and hold them against the weight table.

        Raises:
            InputError: files missing, truncated or outside the folder; tensors missing, unknown or of a wrong shape.
        """
        self.path = Path(folder)
        config = ModelConfig.from_hf(self.path)
        self.tensors = read_folder(self.path)
        config = stored_predictions(config, self.tensors)
        self.table = WeightTable(config)
        self.check_names()
        # What the weights are wins over what config.json says they are: a cast must never happen unseen.
        stored = self.tensors[self.table.entry(EMBEDDING).hf[0].name].dtype
        self.config = dataclasses.replace(config, dtype=str(stored).removeprefix("torch."))
        self.table = WeightTable(self.config)

    def check_names(self) -> None:
        """Every tensor of the table is there with its shape, and no other."""
        expected = self.table.hf_names
        extra = {name for name in self.tensors if name not in expected and not name.endswith(NOT_WEIGHTS)}
        if self.table.config.tie_word_embeddings:
            extra -= self.tied_copies(extra)
        missing = sorted(set(expected) - set(self.tensors))
        if missing or extra:
            raise InputError(
                f"{self.path}: {len(missing)} tensors are missing {missing[:5]}, {len(extra)} are unknown to a"
                f" {self.table.config.family} model {sorted(extra)[:5]}"
            )
        for name, (entry, part) in expected.items():
            found, wanted = self.tensors[name].shape, entry.stored_shape(part)
            if found != wanted:
                raise InputError(f"{self.path}: {name} has shape {list(found)}, config.json asks for {list(wanted)}")

    def tied_copies(self, extra: set[str]) -> set[str]:
        """Output layers of a tied model that are stored too; they have to equal the embedding."""
        embedding = self.tensors[self.table.entry(EMBEDDING).hf[0].name]
        copies = extra & {"lm_head.weight"}
        for name in copies:
            if not torch.equal(self.tensors[name].read(), embedding.read()):
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

    def part(self, hf: HfPart) -> LazyTensor:
        """The stored values of one HF part."""
        tensor = self.tensors[hf.name]
        return tensor if hf.expert is None else tensor.expert(hf.expert, hf.transposed)


def stored_predictions(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """The config without prediction layers where the folder has none of their tensors.

    transformers drops them when it saves a model, and leaves their number in config.json.
    """
    if not config.mtp_num_layers:
        return config
    wanted = {hf.name for entry in WeightTable(config).entries.values() if entry.predicts for hf in entry.hf}
    return config if wanted & set(names) else dataclasses.replace(config, mtp_num_layers=0)


def read_folder(folder: Path) -> dict[str, LazyTensor]:
    """All tensors of a folder of safetensors, by name."""
    index = folder / INDEX
    if index.is_file():
        return read_shards(folder, index)
    if (folder / SINGLE).is_file():
        return read_safetensors(folder / SINGLE)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return read_safetensors(folder / found[0])
    others = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"; {', '.join(others[:3])} would have to be saved as safetensors first" if others else ""
    raise InputError(f"{folder}: neither {INDEX} nor {SINGLE}, {len(found)} other safetensors files{hint}")


def read_shards(folder: Path, index: Path) -> dict[str, LazyTensor]:
    """The tensors an index lists; every shard has to lie in the folder and hold what the index says."""
    try:
        where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{index}: broken index ({type(error).__name__}: {error})") from error
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard:
            raise InputError(f"{index}: shard {shard!r} lies outside the folder; refused")
        if not (folder / shard).is_file():
            raise InputError(f"{folder / shard}: no such file, but {INDEX} lists it; download it again")
        for name, tensor in read_safetensors(folder / shard).items():
            if name in tensors or where.get(name, shard) != shard:
                raise InputError(f"{folder / shard}: {name} is stored twice (the index says {where.get(name)})")
            tensors[name] = tensor
    lost = sorted(set(where) - set(tensors))
    if lost:
        raise InputError(f"{folder}: {len(lost)} tensors of {INDEX} are in no shard: {lost[:5]}")
    return tensors


def hf_parts(source: TensorSource, name: str) -> Iterable[tuple[HfPart, torch.Tensor]]:
    """The HF tensors of one logical tensor, read once."""
    entry = source.table.entry(name)
    axis = entry.hf_map()
    whole = source.read(name)
    for part, hf in enumerate(entry.hf):
        yield hf, narrow(whole, axis.part_ranges(part)) if len(axis.segments) > 1 else whole


def plan_shards(source: TensorSource, shard_bytes: int) -> list[dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
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


def write_hf(
    source: TensorSource,
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write the weights of an HF folder (safetensors, and the index when there are several shards).

    Args:
        folder: an existing folder, as a rule that of a `StagedDirectory`.
        shard_bytes: limit of one file.
        progress: told the bytes of each tensor written.
    """
    shards = plan_shards(source, shard_bytes)
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    writers = [SafetensorsWriter(folder / file, tensors) for file, tensors in zip(files, shards, strict=True)]
    where = {name: number for number, tensors in enumerate(shards) for name in tensors}
    total = 0
    for logical in source.names():
        for hf, values in hf_parts(source, logical):
            values = values.t().contiguous() if hf.transposed else values
            writers[where[hf.name]].write(hf.name, values, hf.expert)
            total += values.nbytes
            progress(values.nbytes)
    for writer in writers:
        writer.close()
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: files[i] for name, i in where.items()}}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def copy_companions(origin: Path, folder: Path, config: ModelConfig) -> list[str]:
    """Copy config, tokenizer, chat template and generation config; config.json says the type of the weights written.

    Returns:
        Names of the files copied.
    """
    copied = []
    for pattern in COMPANIONS:
        for path in sorted(origin.glob(pattern)):
            if path.name.endswith(".index.json") or path.name == "args.json" or not path.is_file():
                continue
            shutil.copyfile(path, folder / path.name)
            copied.append(path.name)
    raw = json.loads((origin / "config.json").read_text(encoding="utf-8"))
    spelling = "torch_dtype" if "torch_dtype" in raw and "dtype" not in raw else "dtype"
    if raw.get(spelling) != config.dtype:
        raw[spelling] = config.dtype
        write_text(folder / "config.json", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
    return copied
