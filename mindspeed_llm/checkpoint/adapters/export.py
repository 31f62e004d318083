"""Logical LoRA as a PEFT folder that peft loads with nothing missing and nothing left over."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mindspeed_llm.checkpoint.adapters.divide import Share, divide, head_of, stays_tied
from mindspeed_llm.checkpoint.adapters.factors import untied
from mindspeed_llm.checkpoint.adapters.peft_config import FILE
from mindspeed_llm.checkpoint.adapters.peft_folder import PREFIX, SAFETENSORS, write_base_record
from mindspeed_llm.checkpoint.adapters.replaced import BasePart
from mindspeed_llm.checkpoint.adapters.servers import describe_servers
from mindspeed_llm.checkpoint.adapters.settings import (
    ROUTER,
    default_and_pattern,
    hf_module,
    peft_module,
    short_targets,
)
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.atomic import StagedDirectory, write_text
from mindspeed_llm.checkpoint.formats.blocks import check_values, write_values
from mindspeed_llm.checkpoint.formats.safetensors_file import SafetensorsWriter
from mindspeed_llm.checkpoint.metadata import BaseRecord, short_name
from mindspeed_llm.checkpoint.tables import EMBEDDING, Entry, WeightTable
from mindspeed_llm.errors import InputError

LEAVES_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names that peft takes for experts' in a model that has any, wherever they stand, under transformers 5."""


class Saved(NamedTuple):
    """A whole tensor in the file: its name there, its HF module, and where it is read."""

    key: str
    module: str
    part: BasePart


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
    table = untied(lora.tensors.table)
    shares = divide(lora, table)
    plain = [share for share in shares if not share.lengths or is_parameter(share, table)]
    if lora.magnitudes and plain:
        raise InputError(
            f"{lora.path}: peft has no DoRA of {plain[0].hf} beside that of others; merge the adapter into its base"
        )
    saved = saved_tensors(lora, shares, table)
    config = peft_config(lora, shares, saved, table, base_path)
    tensors = {
        PREFIX + key: (values.dtype, tuple(values.shape)) for share in shares for key, values in share.tensors(lora)
    }
    tensors |= {PREFIX + one.key: (one.part.dtype, one.part.shape) for one in saved}
    writer = SafetensorsWriter(folder / SAFETENSORS, tensors)
    for share in shares:
        for key, values in share.tensors(lora):
            write_tensor(writer, PREFIX + key, values)
    for one in saved:
        write_tensor(writer, PREFIX + one.key, one.part.read())
    writer.close()
    write_text(folder / FILE, json.dumps(config, indent=2) + "\n")
    return config


def write_tensor(writer: SafetensorsWriter, key: str, values: torch.Tensor) -> None:
    """Write one tensor to its place."""
    place = writer.place(key)
    check_values(key, values, place, place.shape)
    write_values(place.descriptor, place.offset, values)


def saved_tensors(lora: LoraSource, shares: list[Share], table: WeightTable) -> list[Saved]:
    """The whole tensors of an adapter; where the two ends stay tied, the tensor goes under both names.

    Raises:
        InputError: a bias, or a module peft could not save alone.
    """
    adapted = {share.hf for share in shares}
    found = []
    for name in lora.whole():
        entry = table.entries[name]
        if not name.endswith(".weight"):
            raise InputError(f"{lora.path}: replaces {name}; merge the adapter into its base instead")
        names = [hf.name for hf in entry.hf]
        if name == EMBEDDING and stays_tied(lora):
            names.append(f"{head_of(table)}.weight")
        for number, hf in enumerate(names):
            module = peft_module(hf)
            key = f"{module}.base_layer.weight" if module in adapted else f"{module}.weight"
            found.append(Saved(key, module, BasePart(lora.tensors, entry, min(number, len(entry.hf) - 1))))
    return found


def peft_config(
    lora: LoraSource, shares: list[Share], saved: list[Saved], table: WeightTable, base_path: str
) -> dict[str, Any]:
    """`adapter_config.json`: the commonest rank and alpha, patterns for the others, targets by HF name.

    Raises:
        InputError: peft has no words for what the adapter does.
    """
    ranks = {share.hf: len(share.ranks) for share in shares}
    alphas = {share.hf: share.alpha for share in shares}
    r, rank_pattern = default_and_pattern(ranks) if shares else (lora.settings.r, {})
    alpha, alpha_pattern = default_and_pattern(alphas) if shares else (lora.settings.alpha, {})
    stacked_ranks, stacked_alphas = stacked_patterns(lora, shares, table, r, alpha)
    keeps_tie = stays_tied(lora) and EMBEDDING in {*lora.whole(), *(share.entry.name for share in shares)}
    kept = [share for share in shares if not (keeps_tie and share.hf == head_of(table))]
    parameters = [share for share in kept if is_parameter(share, table)]
    experts = {share.hf for share in kept if share.entry.expert is not None and not share.parameter}
    modules = {share.hf for share in kept if not is_parameter(share, table)} - experts
    known = [(hf, entry) for hf, (entry, _) in table.hf_names.items() if is_matrix(entry)]
    targets = {*short_targets(modules, [hf_module(hf) for hf, _ in known]), *map(within_layer, experts)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "inference_mode": True,
        "r": r,
        "lora_alpha": number(alpha),
        "lora_dropout": 0.0 if parameters else lora.settings.dropout,  # peft loads no parameters with dropout
        "bias": "none",
        "use_rslora": False,
        "use_dora": bool(lora.magnitudes),
        "target_modules": sorted(targets),
        "target_parameters": sorted(f"{one.hf}{suffix(one)}" for one in parameters) or None,
        "rank_pattern": stacked_ranks | {pattern(name, parameters): rank for name, rank in rank_pattern.items()},
        "alpha_pattern": stacked_alphas
        | {pattern(name, parameters): number(value) for name, value in alpha_pattern.items()},
        "modules_to_save": sorted({one.module for one in saved} - {share.hf for share in shares}) or None,
        "ensure_weight_tying": keeps_tie,
    }


def is_parameter(share: Share, table: WeightTable) -> bool:
    """Whether peft has to be told of a parameter: of experts, of a router, or of what it would take for experts."""
    mistaken = share.entry.expert is None and share.hf.rpartition(".")[2] in LEAVES_OF_EXPERTS
    router = short_name(share.modules[0]) == ROUTER
    return share.parameter or router or (table.config.num_experts > 0 and mistaken)


def suffix(share: Share) -> str:
    """What follows the module's name in that of the parameter."""
    return "" if share.parameter else ".weight"


def pattern(name: str, parameters: list[Share]) -> str:
    """A regular expression for a name or a name's end; of a parameter it may meet the name with its ending."""
    ending = r"(\.weight)?" if any(share.hf.endswith(name) and not share.parameter for share in parameters) else ""
    return re.escape(name) + ending


def within_layer(module: str) -> str:
    """A module's name without its layer: `mlp.experts.3.up_proj`. Adapted experts are so in every layer."""
    return re.sub(r"^.*\blayers\.\d+\.", "", module)


def stacked_patterns(
    lora: LoraSource, shares: list[Share], table: WeightTable, r: int, alpha: float
) -> tuple[dict[str, int], dict[str, float]]:
    """Patterns for experts of modules of their own, which peft stacks into parameters under transformers 5.

    There gate and up become one pair with both their ranks. Under earlier versions these patterns fit no module.

    Raises:
        InputError: experts differ, or some of a kind are not adapted: peft takes them all alike.
    """
    own = [share for share in shares if share.entry.expert is not None and not share.parameter]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for parts, parameter in ((2, "gate_up_proj"), (1, "down_proj")):
        kind = [share for share in own if len(share.entry.hf) == parts]
        if not kind:
            continue
        alike = {(len(share.ranks), share.alpha) for share in kind}
        every = [
            entry for entry in table.entries.values() if entry.expert is not None and len(entry.shape) == 2
            and entry.layer < table.config.num_layers  # peft knows no prediction layers
            and entry.name.endswith(kind[0].entry.name.rpartition("local_experts.")[2].partition(".")[2])
        ]  # fmt: skip
        if len(alike) > 1 or len(kind) != parts * len(every):
            raise InputError(
                f"{lora.path}: {len(kind)} of {parts * len(every)} weights of experts ({parameter}) are adapted, with"
                f" {len(alike)} ranks or scalings; peft takes all alike, merge the adapter into its base instead"
            )
        rank, scale = next(iter(alike))
        if (rank, scale) != (r, alpha):
            ranks[rf"experts\.{parameter}"], alphas[rf"experts\.{parameter}"] = parts * rank, number(parts * scale)
    return ranks, alphas


def is_matrix(entry: Entry) -> bool:
    """Whether peft can put a pair of factors on it."""
    return len(entry.shape) == 2 and entry.name.endswith(".weight")


def number(value: float) -> int | float:
    """A whole number as an integer, which servers ask for."""
    return int(value) if float(value).is_integer() else value
