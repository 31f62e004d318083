"""What rank files hold more than once: replicas, the last stage's copy of a tied embedding, padding rows.

Reading a checkpoint takes one of the copies; training loads them all. So each has to be looked at as it is stored.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from mindspeed_llm.checkpoint.formats.hf import same_values
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.formats.mcore_names import FileNames
from mindspeed_llm.checkpoint.layout import CHECKPOINT_FILE
from mindspeed_llm.checkpoint.tables import EMBEDDING, OUTPUT_LAYER, is_lora
from mindspeed_llm.models.families.base import Kind


@dataclass(frozen=True)
class Copy:
    """A stored copy that is not what it has to be.

    Attributes:
        name: logical name.
        where: the file.
        problem: what is wrong.
    """

    name: str
    where: str
    problem: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def wrong_copies(checkpoint: MegatronCheckpoint) -> tuple[int, list[Copy]]:
    """(copies looked at, those that are wrong)."""
    looked, wrong = 0, []
    for rank in checkpoint.layout.ranks():
        where = f"{checkpoint.layout.rank_folder(*rank)}/{CHECKPOINT_FILE}"
        for vp_rank, key in enumerate(checkpoint.layout.model_keys()):
            names = FileNames(checkpoint.table, checkpoint.layout, rank, vp_rank)
            for name, tensor, _ in checkpoint.local_tensors((), key, rank, names):
                original = original_of(checkpoint, name, names.experts.part, rank.tp)
                if original is None or original == tensor:
                    continue
                looked += 1
                if not same_values(tensor, original):
                    tied = name == OUTPUT_LAYER and checkpoint.config.tie_word_embeddings
                    problem = "a stale copy of the tied embedding" if tied else f"not equal to {place(original)}"
                    wrong.append(Copy(name, where, problem))
    padding = wrong_padding(checkpoint)
    return looked + padding[0], wrong + padding[1]


def original_of(checkpoint: MegatronCheckpoint, name: str, expert_part: int, tp_rank: int) -> LazyTensor | None:
    """The stored tensor that is read in place of a copy; None for tensors that are no base weights."""
    stored = None if is_lora(name) else checkpoint.tensors.get(checkpoint.table.resolve(name))
    if stored is None:
        return None
    if stored.axis.dim is None:
        return stored.parts[0]
    return stored.parts[expert_part if checkpoint.table.entry(name).expert is not None else tp_rank]


def place(tensor: LazyTensor) -> str:
    """The rank folder a tensor lies in."""
    return tensor.path.parent.name


def wrong_padding(checkpoint: MegatronCheckpoint) -> tuple[int, list[Copy]]:
    """(shares with padding rows, those whose padding is not the vocabulary's last row)."""
    looked, wrong = 0, []
    for name in (EMBEDDING, OUTPUT_LAYER):
        stored = checkpoint.tensors.get(name)
        if stored is None or checkpoint.table.entry(name).kind is not Kind.VOCAB:
            continue
        rows = checkpoint.config.vocab_size
        last = checkpoint.base().read(name, [(rows - 1, rows)])
        for part, padding in zip(stored.parts, stored.axis.padding, strict=True):
            if not padding:
                continue
            looked += 1
            held = part.read([(part.shape[0] - padding, part.shape[0])])
            if not torch.equal(held, last.expand_as(held)):
                wrong.append(Copy(name, place(part), f"{padding} padding rows are not the last row"))
    return looked, wrong
