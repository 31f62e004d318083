"""Logical LoRA as a PEFT folder that peft loads with nothing missing and nothing left over.

A fused module's pair is divided among its HF modules: each gets A whole and its rows of B. Ranks whose column of B is
zero in those rows do nothing there and are left out, so a pair that was joined comes apart again.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mindspeed_llm.checkpoint.adapters.import_ import untied
from mindspeed_llm.checkpoint.adapters.peft_config import FILE
from mindspeed_llm.checkpoint.adapters.peft_folder import PREFIX, SAFETENSORS, write_base_record
from mindspeed_llm.checkpoint.adapters.servers import describe_servers
from mindspeed_llm.checkpoint.adapters.settings import default_and_pattern, hf_module, short_targets
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.atomic import StagedDirectory, write_text
from mindspeed_llm.checkpoint.formats.blocks import check_values, write_values
from mindspeed_llm.checkpoint.formats.lazy import part_of
from mindspeed_llm.checkpoint.formats.safetensors_file import SafetensorsWriter
from mindspeed_llm.checkpoint.metadata import BaseRecord
from mindspeed_llm.checkpoint.tables import EMBEDDING, OUTPUT_LAYER, Entry, WeightTable
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.families.base import Stacked


@dataclass(frozen=True)
class HfFactors:
    """What one HF module gets of a logical pair.

    Attributes:
        hf: the HF module.
        module: the logical module.
        part: which of its HF parts.
        ranks: numbers of the pair's ranks it gets.
        scaling: of the pair.
    """

    hf: str
    module: str
    part: int
    ranks: tuple[int, ...]
    scaling: float


def write_peft(lora: LoraSource, folder: str | Path, base_path: str, base: BaseRecord | None = None) -> str:
    """Write an adapter as a PEFT folder, which appears finished or not at all.

    Args:
        folder: the result; an existing one is replaced.
        base_path: what peft is to load the base from.
        base: recorded beside the adapter, for `check_base`; that of the adapter when None.

    Returns:
        One line for people: what the folder holds, and which servers take it by their documentation.

    Raises:
        InputError: the adapter is something peft's files do not express, or cannot be written.
    """
    stage = StagedDirectory(folder)
    stage.create()
    try:
        config = write_into(lora, stage.path, base_path)
        record = base or lora.base
        if record is not None and record.hash:
            write_base_record(stage.path, BaseRecord(base_path, record.hash))
        stage.publish()
    except OSError as error:
        stage.discard()
        raise InputError(f"{folder}: cannot be written ({error.strerror}); nothing was left behind") from error
    except BaseException:
        stage.discard()
        raise
    return describe_servers(config)


def write_into(lora: LoraSource, folder: Path, base_path: str) -> dict[str, Any]:
    """Write the two files of an adapter into an existing folder; returns the config."""
    if lora.magnitudes:
        raise InputError(f"{lora.path}: DoRA is not exported; merge it into its base, or keep the PEFT folder")
    table = untied(lora.tensors.table)
    factors = [one for module in lora.modules() for one in divide(lora, table, module)]
    tensors = {key: (values.dtype, tuple(values.shape)) for one in factors for key, values in stored(lora, table, one)}
    saved = saved_tensors(lora, table)
    adapted = {one.hf for one in factors}
    keys = {hf: saved_key(hf, adapted) for hf in saved}
    tensors |= {keys[hf]: (lora.tensors.dtype(name), shape) for hf, (name, _, shape) in saved.items()}
    config = peft_config(lora, factors, saved, table, base_path)
    writer = SafetensorsWriter(folder / SAFETENSORS, tensors)
    for one in factors:
        for key, values in stored(lora, table, one):
            write_tensor(writer, key, values)
    for hf, (name, part, _) in saved.items():
        entry = table.entries[name]
        read = lambda rows, columns, name=name: lora.tensors.read(name, rows, columns)  # noqa: E731
        write_tensor(writer, keys[hf], part_of(read, entry.hf_map(), part))
    writer.close()
    write_text(folder / FILE, json.dumps(config, indent=2) + "\n")
    return config


def write_tensor(writer: SafetensorsWriter, key: str, values: torch.Tensor) -> None:
    """Write one tensor to its place."""
    place = writer.place(key)
    check_values(key, values, place, place.shape)
    write_values(place.descriptor, place.offset, values)


def divide(lora: LoraSource, table: WeightTable, module: str) -> list[HfFactors]:
    """The HF modules a logical module's pair goes to, each with the ranks that do something there."""
    entry = table.entries[f"{module}.weight"]
    if entry.row.stacked is not Stacked.NO:
        raise InputError(
            f"{lora.path}: {module}: {entry.hf[0].name} holds all experts in one tensor; such adapters are not exported"
            " yet, merge it into its base instead"
        )
    b = lora.tensors.read(f"{module}.lora_B.weight")
    axis, scaling = entry.hf_map(), lora.settings.scaling(module)
    used = []
    for part in range(len(entry.hf)):
        own = torch.cat([b[start:stop] for start, stop in axis.part_ranges(part)])
        used.append(tuple((own != 0).any(dim=0).nonzero().flatten().tolist()))
    # An expert's parts keep all ranks: transformers 5 stacks experts, which takes equal ranks and both of gate and up.
    if entry.expert is not None or not any(used):
        used = [tuple(range(b.shape[1]))] * len(entry.hf)
    found = [
        HfFactors(hf_module(hf.name), module, part, ranks, scaling)
        for part, (hf, ranks) in enumerate(zip(entry.hf, used, strict=True))
        if ranks
    ]
    if entry.name == EMBEDDING and stays_tied(lora):
        found.append(dataclasses.replace(found[0], hf=head_of(table)))
    return found


def stays_tied(lora: LoraSource) -> bool:
    """Whether the output layer is the embedding, with the adapter too."""
    return lora.tensors.config.tie_word_embeddings and not lora.unties


def head_of(table: WeightTable) -> str:
    """The HF module of the output layer."""
    return hf_module(table.entries[OUTPUT_LAYER].hf[0].name)


def stored(lora: LoraSource, table: WeightTable, one: HfFactors) -> list[tuple[str, torch.Tensor]]:
    """The two tensors of an HF module, under their names in the file."""
    ranks = torch.tensor(one.ranks)
    entry = table.entries[f"{one.module}.weight"]
    a = lora.tensors.read(f"{one.module}.lora_A.weight")[ranks]
    b = lora.tensors.read(f"{one.module}.lora_B.weight", entry.hf_map().part_ranges(one.part))[:, ranks]
    name = PREFIX + one.hf
    if entry.name == EMBEDDING and one.hf != head_of(table):
        return [
            (f"{name}.lora_embedding_A", b.t().contiguous()),
            (f"{name}.lora_embedding_B", a.t().contiguous()),
        ]
    return [(f"{name}.lora_A.weight", a.contiguous()), (f"{name}.lora_B.weight", b.contiguous())]


def saved_tensors(lora: LoraSource, table: WeightTable) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """Whole tensors by HF name: logical name, part and shape; where the ends stay tied, both names have the tensor."""
    found = {}
    for name in lora.whole():
        entry = table.entries[name]
        for part, hf in enumerate(entry.hf):
            found[hf.name] = (name, part, entry.hf_shape(part))
        if name == EMBEDDING and stays_tied(lora):
            found[table.entries[OUTPUT_LAYER].hf[0].name] = (name, 0, entry.shape)
    return found


def saved_key(hf: str, adapted: set[str]) -> str:
    """The name of a whole tensor in the file: under peft's wrapper where its module has factors too."""
    module = hf_module(hf)
    return f"{PREFIX}{module}.base_layer.weight" if module in adapted else PREFIX + hf


def peft_config(
    lora: LoraSource,
    factors: list[HfFactors],
    saved: Mapping[str, tuple[str, int, tuple[int, ...]]],
    table: WeightTable,
    base_path: str,
) -> dict[str, Any]:
    """`adapter_config.json`: the commonest rank and alpha, patterns for the others, targets by HF name.

    Raises:
        InputError: peft has no words for what the adapter does.
    """
    ranks = {one.hf: len(one.ranks) for one in factors}
    alphas = {one.hf: one.scaling * len(one.ranks) for one in factors}
    experts = expert_rank(lora, factors, table)
    r, rank_pattern = default_and_pattern(ranks, experts and experts[0]) if ranks else (lora.settings.r, {})
    alpha, alpha_pattern = default_and_pattern(alphas, experts and experts[1]) if ranks else (lora.settings.alpha, {})
    linear = [hf_module(hf) for hf, (entry, _) in table.hf_names.items() if is_matrix(entry)]
    changed = {*lora.whole(), *(f"{one.module}.weight" for one in factors)}
    keeps_tie = stays_tied(lora) and EMBEDDING in changed
    targets = {one.hf for one in factors if not (keeps_tie and one.hf == head_of(table))}
    biases = [hf for hf in saved if hf.endswith(".bias")]
    if biases:
        raise InputError(f"{lora.path}: replaces {biases[0]}; merge the adapter into its base instead")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "inference_mode": True,
        "r": r,
        "lora_alpha": number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": list(short_targets(targets, linear)),
        "rank_pattern": {escaped(name): rank for name, rank in rank_pattern.items()},
        "alpha_pattern": {escaped(name): number(value) for name, value in alpha_pattern.items()},
        "modules_to_save": sorted({hf_module(hf) for hf in saved} - set(ranks)) or None,
        "ensure_weight_tying": keeps_tie,
    }


def expert_rank(lora: LoraSource, factors: list[HfFactors], table: WeightTable) -> tuple[int, float] | None:
    """Rank and alpha of the experts' pairs, which peft reads from the defaults alone; None without such pairs.

    Raises:
        InputError: they differ, or some experts of the model have none.
    """
    own = [one for one in factors if table.entries[f"{one.module}.weight"].expert is not None]
    if not own:
        return None
    found = Counter((len(one.ranks), one.scaling * len(one.ranks)) for one in own)
    kinds = {hf_module(one.hf).rpartition(".")[2] for one in own}
    every = [
        hf
        for hf, (entry, _) in table.hf_names.items()
        if entry.expert is not None and hf_module(hf).rpartition(".")[2] in kinds
    ]
    if len(found) > 1 or len(own) != len(every):
        raise InputError(
            f"{lora.path}: experts have {len(found)} ranks and scalings, and {len(own)} of {len(every)} weights are"
            " adapted; peft takes all experts alike, merge the adapter into its base instead"
        )
    return next(iter(found))


def is_matrix(entry: Entry) -> bool:
    """Whether peft can put a pair of factors on it."""
    return len(entry.shape) == 2 and entry.name.endswith(".weight")


def escaped(name: str) -> str:
    """A module's name as a pattern of peft's, which are regular expressions."""
    return re.escape(name)


def number(value: float) -> int | float:
    """A whole number as an integer, which servers ask for."""
    return int(value) if float(value).is_integer() else value
