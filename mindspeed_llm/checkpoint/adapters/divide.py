"""Logical pairs divided among the HF modules, or parameters of experts, that peft puts its factors on.

Each HF module of a fused layer gets A whole and its rows of B. Ranks whose column of B is zero in those rows do nothing
there and are left out, so a pair that was joined comes apart again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mindspeed_llm.checkpoint.adapters.expert_blocks import PARAMETERS, blocks_of, joined_parts
from mindspeed_llm.checkpoint.adapters.parts import adapted_parts
from mindspeed_llm.checkpoint.adapters.settings import hf_module, peft_module
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.tables import EMBEDDING, MAGNITUDE, OUTPUT_LAYER, Entry, WeightTable
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.families.base import Stacked

WITHOUT_CONVERSION = ("qwen2_moe",)
"""Families whose adapters of single experts peft 0.21 does not stack under transformers 5: they are stacked here."""


@dataclass(frozen=True)
class Share:
    """What one HF module, or one parameter of all experts, gets of logical pairs.

    Attributes:
        hf: the HF module or parameter, as peft's patterns see it.
        keys: names of A and B in the file, without peft's prefix; an embedding's stand for B and A transposed.
        modules: the logical module, or those of all experts of a parameter.
        part: which of its HF parts.
        ranks: numbers of the pair's ranks it gets.
        scaling: of the pair.
        entry: the logical weight (the first expert's).
        parameter: it is a parameter that holds all experts, gate above up.
        lengths: it has DoRA's lengths of its rows.
    """

    hf: str
    keys: tuple[str, str]
    modules: tuple[str, ...]
    part: int
    ranks: tuple[int, ...]
    scaling: float
    entry: Entry
    parameter: bool = False
    lengths: bool = False

    @property
    def alpha(self) -> float:
        """peft's alpha for it."""
        return self.scaling * len(self.ranks)

    def tensors(self, lora: LoraSource) -> list[tuple[str, torch.Tensor]]:
        """Its two tensors, by their names in the file without peft's prefix."""
        pairs = [self.pair(lora, module) for module in self.modules]
        a, b = blocks_of(pairs) if self.parameter else pairs[0]
        if self.keys[0].endswith(".lora_embedding_A"):
            a, b = b.t(), a.t()
        found = [(self.keys[0], a.contiguous()), (self.keys[1], b.contiguous())]
        if self.lengths:
            rows = self.entry.hf_map().part_ranges(self.part)
            values = lora.magnitudes[self.modules[0]].read(rows).to(b.dtype)
            found.append((f"{self.hf}.{MAGNITUDE}", values.contiguous()))
        return found

    def pair(self, lora: LoraSource, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [ranks, in] and B [rows of the part, ranks] of one logical module."""
        ranks = torch.tensor(self.ranks)
        axis = self.entry.hf_map()
        rows = (joined_parts(axis) if self.parameter else axis).part_ranges(self.part)
        return (
            lora.tensors.read(f"{module}.lora_A.weight")[ranks],
            lora.tensors.read(f"{module}.lora_B.weight", rows)[:, ranks],
        )


def divide(lora: LoraSource, table: WeightTable) -> list[Share]:
    """Everything an adapter's pairs are divided into, in the order of the network.

    Raises:
        InputError: experts that transformers holds in one parameter are not adapted alike.
    """
    shares: list[Share] = []
    blocks: dict[str, list[str]] = {}
    trimmed = expert_ranks(lora, table)
    for module in lora.modules():
        entry = table.entries[f"{module}.weight"]
        if entry.row.stacked is not Stacked.NO:
            blocks.setdefault(entry.hf[0].name, []).append(module)
        elif entry.expert is not None and table.config.family in WITHOUT_CONVERSION:
            parameter = next(name for name, short in PARAMETERS.items() if module.endswith(short))
            holder = hf_module(entry.hf[0].name).rpartition(f".{entry.expert}.")[0]
            blocks.setdefault(f"{holder}.{parameter}", []).append(module)
        else:
            shares += module_shares(lora, table, module, trimmed)
    return shares + [block_share(lora, table, name, modules, blocks) for name, modules in blocks.items()]


def module_shares(lora: LoraSource, table: WeightTable, module: str, trimmed: dict[str, list[tuple]]) -> list[Share]:
    """The shares of one logical module."""
    entry = table.entries[f"{module}.weight"]
    if entry.expert is None:
        used = used_ranks(lora, module, entry)
        if not any(used):
            adapted = adapted_parts(lora.settings, module, entry)
            used = [every_rank(lora, module) * (part in adapted) for part in range(len(entry.hf))]
    else:
        used = trimmed.get(module) or [every_rank(lora, module)] * len(entry.hf)
    scaling = lora.settings.scaling(module)
    lengths = [False] * len(entry.hf)
    if module in lora.magnitudes:  # a part has lengths of all its rows or of none; with them it is there, B zero or not
        lengths = [
            not bool(lora.magnitudes[module].read(entry.hf_map().part_ranges(part)).isnan().any())
            for part in range(len(entry.hf))
        ]
        used = [ranks or every_rank(lora, module) * has for ranks, has in zip(used, lengths, strict=True)]
    shares = [
        Share(
            peft_module(hf.name), factor_keys(peft_module(hf.name)), (module,), part, ranks, scaling, entry, False, has
        )
        for part, (hf, ranks, has) in enumerate(zip(entry.hf, used, lengths, strict=True))
        if ranks
    ]
    if entry.name == EMBEDDING:
        own, head = shares[0].hf, head_of(table)
        keys = f"{own}.lora_embedding_A", f"{own}.lora_embedding_B"
        tied = [Share(head, factor_keys(head), *values_of(shares[0]))] if stays_tied(lora) else []
        shares = [Share(own, keys, *values_of(shares[0])), *tied]
    return shares


def values_of(share: Share) -> tuple:
    """A share without its names."""
    return share.modules, share.part, share.ranks, share.scaling, share.entry


def factor_keys(module: str) -> tuple[str, str]:
    """Names of a module's A and B."""
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def every_rank(lora: LoraSource, module: str) -> tuple[int, ...]:
    """Numbers of all ranks of a logical module."""
    return tuple(range(lora.settings.rank(module)))


def used_ranks(lora: LoraSource, module: str, entry: Entry) -> list[tuple[int, ...]]:
    """For each HF part of a logical module, the ranks with a column of B that is not zero there."""
    b = lora.tensors.read(f"{module}.lora_B.weight")
    own = [torch.cat([b[start:stop] for start, stop in entry.hf_map().part_ranges(p)]) for p in range(len(entry.hf))]
    return [tuple((rows != 0).any(dim=0).nonzero().flatten().tolist()) for rows in own]


def expert_ranks(lora: LoraSource, table: WeightTable) -> dict[str, list[tuple]]:
    """The used ranks of experts' modules, if every part of every expert uses equally many; else nothing.

    transformers 5 stacks experts, which takes equal ranks, and both gate and up.
    """
    found: dict[str, list[tuple]] = {}
    for module in lora.modules():
        entry = table.entries[f"{module}.weight"]
        if entry.expert is not None and len(entry.hf) > 1:
            found[module] = used_ranks(lora, module, entry)
    counts = {len(ranks) for used in found.values() for ranks in used}
    return found if len(counts) == 1 and counts != {0} else {}


def block_share(lora: LoraSource, table: WeightTable, name: str, modules: list[str], blocks: Iterable[str]) -> Share:
    """The share of one parameter `name` that holds all experts of a layer.

    Args:
        modules: the logical modules of its adapted experts, by number.
        blocks: every adapted parameter.
    """
    first = table.entries[f"{modules[0]}.weight"]
    alike = {(lora.settings.rank(module), lora.settings.scaling(module)) for module in modules}
    if len(modules) != first.config.num_experts or len(alike) > 1:
        raise InputError(
            f"{lora.path}: {name} holds {first.config.num_experts} experts, {len(modules)} of them are adapted with"
            f" {len(alike)} ranks or scalings; peft takes all alike, merge the adapter into its base instead"
        )
    holder, _, parameter = name.rpartition(".")
    later = list(PARAMETERS)[list(PARAMETERS).index(parameter) + 1 :]
    wrapped = holder + ".base_layer" * sum(f"{holder}.{one}" in blocks for one in later)
    scaling = lora.settings.scaling(modules[0])
    return Share(name, factor_keys(wrapped), tuple(modules), 0, every_rank(lora, modules[0]), scaling, first, True)


def stays_tied(lora: LoraSource) -> bool:
    """Whether the output layer is the embedding, with the adapter too."""
    return lora.tensors.config.tie_word_embeddings and not lora.unties


def head_of(table: WeightTable) -> str:
    """The HF module of the output layer."""
    return hf_module(table.entries[OUTPUT_LAYER].hf[0].name)
