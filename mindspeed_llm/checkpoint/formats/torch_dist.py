"""megatron-core's `torch_dist` checkpoints, read as logical tensors without megatron-core.

<run>/latest_checkpointed_iteration.txt
<run>/iter_0000020/metadata.json     {"sharded_backend": "torch_dist", ...}
<run>/iter_0000020/.metadata         which key lies where
<run>/iter_0000020/__R_N.distcp      tensors
<run>/iter_0000020/common.pt         args, iteration
<run>/iter_0000020/args.json         ours only
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mindspeed_llm.checkpoint.formats.lazy import Readable, assemble, listed
from mindspeed_llm.checkpoint.formats.run_folder import is_megatron, resolve
from mindspeed_llm.checkpoint.formats.torch_dist_file import METADATA, ChunkedTensor, StoredTensor, read_index
from mindspeed_llm.checkpoint.formats.torch_dist_names import OPTIMIZER, WRAPPER, Spelling, spellings
from mindspeed_llm.checkpoint.formats.torch_file import read_torch_file
from mindspeed_llm.checkpoint.kinds import AxisMap, Ranges, Segment
from mindspeed_llm.checkpoint.metadata import Metadata, read_metadata
from mindspeed_llm.checkpoint.tables import EMBEDDING, Entry, WeightTable, is_lora
from mindspeed_llm.checkpoint.upstream_args import check_recorded, config_from_args
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families.base import Kind

SETTINGS = "metadata.json"
COMMON = "common.pt"
BACKEND = "torch_dist"


def is_torch_dist(folder: str | Path) -> bool:
    """Whether a run or iteration folder holds a checkpoint of megatron-core's dist_checkpointing.

    True for its other backends too, which `TorchDistSource` refuses by name.
    """
    place = checkpoint_folder(folder)
    return any(os.path.lexists(place / name) for name in (SETTINGS, METADATA))


def checkpoint_folder(folder: str | Path) -> Path:
    """The iteration folder of a run folder, or the folder itself; `InputError` for a wrong tracker."""
    folder = Path(folder)
    return resolve(folder) if is_megatron(folder) else folder


class TorchDistSource:
    """A `torch_dist` checkpoint as logical tensors (`TensorSource`).

    Attributes:
        metadata: what its args.json says; None without one.
        notes: what was left out, one line each, for the program to say.
        known_hash: the content hash, once somebody asked for it (`open.source_hash`).
    """

    known_hash: str | None = None

    def __init__(
        self,
        folder: str | Path,
        config: ModelConfig | None = None,
        family_name: str | None = None,
        ignore_unknown: bool = False,
    ) -> None:
        """Open a run or iteration folder; the index is read, tensors are not.

        Args:
            config: the model, if known from an HF folder; it replaces the pickled args, not an args.json.
            family_name: `--model-type-hf`, for checkpoints that do not say their family.
            ignore_unknown: tensors the weight table does not know are left out, and a note says so.

        Raises:
            InputError: files missing, broken or of another backend; tensors missing, unknown or of a wrong shape.
        """
        self.path = checkpoint_folder(folder)
        self.notes: list[str] = []
        check_backend(self.path)
        tensors, objects = read_index(self.path)
        self.stored = self.weights(tensors, objects)
        self.metadata: Metadata | None = read_metadata(self.path)
        args = self.common_args()
        if self.metadata:
            check_recorded(args, self.metadata.model, str(self.path))
            config = self.metadata.model
        elif config is None:
            config = config_from_args(args, str(self.path / COMMON), self.embedding().dtype, family_name)
        self.config = dataclasses.replace(config, dtype=str(self.embedding().dtype).removeprefix("torch."))
        self.table = WeightTable(self.config)
        self.tensors: dict[str, Sequence[Readable]] = {}
        self.find(ignore_unknown)

    def weights(self, tensors: dict[str, StoredTensor], objects: list[str]) -> dict[str, StoredTensor]:
        """The tensors that are no optimizer state, by key without wrappers; a note counts what is left out."""
        kept = {WRAPPER.sub("", key): tensor for key, tensor in tensors.items() if not OPTIMIZER.match(key)}
        states = [key for key in objects if "_extra_state" not in key]
        left = [f"{len(tensors) - len(kept)} tensors of optimizer state"] if len(kept) < len(tensors) else []
        left += [f"{len(states)} other states ({', '.join(sorted({key.split('/')[0] for key in states})[:3])})"] * bool(
            states
        )
        if left:
            self.notes.append(f"{self.path}: {' and '.join(left)} are left out; weights only")
        return kept

    def embedding(self) -> StoredTensor:
        """The embedding; `InputError` without one."""
        if EMBEDDING not in self.stored:
            raise InputError(f"{self.path}: no tensor {EMBEDDING}, but {listed(self.stored, 3)}; not a language model")
        return self.stored[EMBEDDING]

    def common_args(self) -> Any:
        """The args in common.pt, which belongs to every checkpoint of this kind; None when it has none."""
        content = read_torch_file(self.path / COMMON)
        return content.get("args") if isinstance(content, dict) else None

    def find(self, ignore_unknown: bool) -> None:
        """Give every tensor of the table its place; `InputError` for missing, unknown and misshapen ones."""
        places: dict[tuple[str, int], dict] = {}
        missing, known = [], set()
        for entry in self.table.entries.values():
            options = list(spellings(entry))
            known.update(key for option in options for key in option.keys)
            found = next((option for option in options if all(key in self.stored for key in option.keys)), None)
            if found is None:
                missing.append(entry.name)
            else:
                self.tensors[entry.name] = [self.part(entry, found, key, places) for key in found.keys]
        strange = sorted(key for key in self.stored if key not in known and not is_lora(key))
        if strange and ignore_unknown:
            self.notes.append(f"{self.path}: {len(strange)} unknown tensors are left out: {listed(strange)}")
        wrong = [f"{len(missing)} tensors are missing {listed(missing)}"] if missing else []
        if strange and not ignore_unknown:
            wrong.append(f"{len(strange)} are unknown to a {self.config.family} model {listed(strange)}")
            wrong.append("--ignore-unknown leaves them out")
        if wrong:
            raise InputError(f"{self.path}: {'; '.join(wrong)}")

    def part(self, entry: Entry, found: Spelling, key: str, places: dict[tuple[str, int], dict]) -> ChunkedTensor:
        """One key's share of a logical tensor; `places` remembers the chunks of each key by place."""
        stored, leading = self.stored[key], len(found.axes)
        shape = (entry.shape[0] // len(found.keys), *entry.shape[1:])
        rows = stored.shape[leading] if len(stored.shape) > leading else 0
        padded = entry.kind is Kind.VOCAB and rows > shape[0]
        if stored.shape != (*found.axes, rows if padded else shape[0], *shape[1:]):
            wanted = [*found.axes, *shape]
            raise InputError(f"{self.path}: {key} has shape {list(stored.shape)}, its settings ask for {wanted}")
        if (key, leading) not in places:
            places[key, leading] = stored.by_place(leading)
        return ChunkedTensor(shape, stored.dtype, found.place, tuple(places[key, leading][found.place]))

    @property
    def lora_names(self) -> list[str]:
        """Logical names of the LoRA factors beside these weights, which `torch_dist_run` reads."""
        return [key for key in self.stored if is_lora(key)]

    def names(self) -> list[str]:
        """Logical names, in the order of the network."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        return self.table.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values in the files."""
        return self.parts(name)[0].dtype

    def parts(self, name: str) -> Sequence[Readable]:
        """What a logical tensor is made of; `InputError` when there is no such tensor."""
        return self.tensors[self.table.entry(name).name]

    def read(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        """The logical tensor, or a box of it."""
        parts = self.parts(name)
        if len(parts) == 1:
            return parts[0].read(rows, columns)
        segments = tuple(Segment(number, 0, part.shape[0]) for number, part in enumerate(parts))
        return assemble(parts, AxisMap(0, segments, (0,) * len(parts)), rows, columns)


def check_backend(folder: Path) -> None:
    """`InputError` when a folder is no dist_checkpointing checkpoint, or one of another backend."""
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        backend = settings["sharded_backend"]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); no finished {BACKEND} checkpoint") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: does not name its backend ({type(error).__name__}: {error})") from error
    if backend != BACKEND:
        raise InputError(f"{folder}: sharded_backend {backend!r} cannot be read; save it with {BACKEND}")
