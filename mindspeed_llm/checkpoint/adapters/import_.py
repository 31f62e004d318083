"""A PEFT folder as logical LoRA: exactly what peft would compute with it on this base, or a refusal.

adapter_config.json, adapter_model.safetensors -> pairs by HF module -> placed in logical modules -> joined
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mindspeed_llm.checkpoint.adapters.expert_blocks import ExpertBlock, expert_pairs, find_blocks
from mindspeed_llm.checkpoint.adapters.factors import (
    AdapterTensors,
    Joined,
    Pair,
    Placed,
    Transposed,
    join,
    logical_tensors,
    untied,
)
from mindspeed_llm.checkpoint.adapters.parts import named_parts
from mindspeed_llm.checkpoint.adapters.peft_config import PeftConfig
from mindspeed_llm.checkpoint.adapters.peft_folder import read_base_record, read_tensors
from mindspeed_llm.checkpoint.adapters.replaced import token_tensors, whole_tensors
from mindspeed_llm.checkpoint.adapters.settings import hf_module, peft_module, settings_of
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.adapters.stored import with_stored
from mindspeed_llm.checkpoint.adapters.tied import Ends, resolve_tie
from mindspeed_llm.checkpoint.formats.lazy import InMemory, LazyTensor, Readable, TensorSource
from mindspeed_llm.checkpoint.kinds import AxisMap
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.checkpoint.tables import EMBEDDING, MAGNITUDE, OUTPUT_LAYER, Entry, WeightTable
from mindspeed_llm.errors import InputError

FACTORS = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})


@dataclass
class Module:
    """What is known of one logical module while a folder is read.

    Attributes:
        axis: how the tensors that pairs adapt make up its rows.
        placed: its pairs.
        magnitudes: DoRA's vectors by part.
    """

    entry: Entry
    axis: AxisMap
    placed: list[Placed]
    magnitudes: dict[int, LazyTensor]


def open_peft(path: str | Path, base: TensorSource) -> LoraSource:
    """The adapter in a PEFT folder.

    Args:
        base: the model it is to be used with: names and shapes are held against it, and tensors of which the adapter
            replaces a part are completed from it.

    Raises:
        InputError: files missing or damaged, a setting whose effect cannot be kept, or tensors the base has no place
            for or the config does not ask for.
    """
    folder = Path(path)
    config = PeftConfig.read(folder)
    found = read_tensors(folder)
    table = untied(base.table)
    blocks = find_blocks(found.factors, config, table)
    plain = {peft_module(module): own for module, own in found.factors.items() if module not in blocks}
    check_targets(plain, config, table, bool(blocks))
    modules = {**plain_modules(plain, config, table), **block_modules(blocks, config)}
    joined = {name: join(one.axis, one.entry.shape[0], one.placed) for name, one in modules.items()}
    replaced = whole_tensors(found, config, base, table)
    replaced.update(token_tensors(found, config, base, table, replaced))
    ends = Ends(joined, replaced)
    unties = base.config.tie_word_embeddings and resolve_tie(ends, config, table)
    lora = LoraSource(
        AdapterTensors(folder, base.table, logical_tensors(ends.joined, ends.replaced, table)),
        import_settings(ends.joined, config, base.table, modules),
        read_base_record(folder, config),
        metadata=None,
        checkpoint=None,
        unties=unties,
        magnitudes={name: magnitudes(one) for name, one in modules.items() if one.magnitudes},
    )
    return with_stored(lora, saved_modules(lora, config))


def saved_modules(lora: LoraSource, config: PeftConfig) -> tuple[str, ...]:
    """The logical modules that modules_to_save trained whole; tables of which single tokens were trained are none."""
    if config.trainable_token_indices:
        return ()
    weights = [name for name in lora.whole() if name.endswith(".weight")]
    entries = lora.tensors.table.entries
    parts = {name: entries[name].hf for name in weights if name in entries}
    return tuple(
        hf_module(name)
        for name, hf in parts.items()
        if all(config.saves(hf_module(part.name)) or config.saves(peft_module(part.name)) for part in hf)
    )


def check_targets(
    factors: Mapping[str, Mapping[str, LazyTensor]], config: PeftConfig, table: WeightTable, has_blocks: bool
) -> None:
    """`InputError` when the file and the config do not speak of the same modules: peft would drop or invent some."""
    targeted = set()
    known = by_module(table)
    for module, (entry, _) in known.items():
        linear = entry.name not in (EMBEDDING, OUTPUT_LAYER)
        if config.targets(module, linear) or config.targets_parameter(f"{module}.weight"):
            targeted.add(module)
    ends = {hf_module(table.entries[name].hf[0].name) for name in (EMBEDDING, OUTPUT_LAYER)}
    if config.ensure_weight_tying and targeted & ends:
        targeted |= ends & set(factors)
    for module in factors:
        if module not in known:
            raise InputError(f"{config.path.parent}: {module} is unknown to a {table.config.family} model")
        if module not in targeted:
            raise InputError(
                f"{config.path}: does not target {module}, which the adapter's file holds factors for; peft would"
                " leave them out"
            )
    # Names of experts stand for blocks in transformers 5 and for modules before, and only one of them is stored.
    if has_blocks or table.config.num_experts:
        return
    lost = sorted(module for module in targeted if module not in factors)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(f"{config.path}: targets {lost[0]}{more}, which the adapter's file holds no factors for")


def by_module(table: WeightTable) -> dict[str, tuple[Entry, int]]:
    """The HF modules, as peft names them, that a pair of factors can be on, in the order of the network."""
    return {
        peft_module(name): (entry, part)
        for name, (entry, part) in table.hf_names.items()
        if len(entry.shape) == 2 and name.endswith(".weight")
    }


def plain_modules(
    factors: Mapping[str, Mapping[str, LazyTensor]], config: PeftConfig, table: WeightTable
) -> dict[str, Module]:
    """The logical modules that pairs of single HF modules adapt, in the order of the network."""
    found: dict[str, Module] = {}
    for hf, (entry, part) in by_module(table).items():
        if hf not in factors:
            continue
        own = dict(factors[hf])
        magnitude = own.pop(MAGNITUDE, None)
        if (magnitude is not None) != config.use_dora:
            raise InputError(
                f"{config.path}: use_dora is {config.use_dora}, but {hf} has {'a' if magnitude else 'no'} magnitude"
            )
        name = hf_module(entry.name)
        module = found.setdefault(name, Module(entry, entry.hf_map(), [], {}))
        module.placed.append(Placed(part, checked_pair(hf, own, entry, part, config)))
        if magnitude is not None:
            if entry.name == EMBEDDING or magnitude.shape != entry.hf_shape(part)[:1]:
                raise InputError(
                    f"{config.path.parent}: DoRA of {hf} with a magnitude {list(magnitude.shape)}; merge it"
                )
            module.magnitudes[part] = magnitude
    return found


def checked_pair(hf: str, own: Mapping[str, LazyTensor], entry: Entry, part: int, config: PeftConfig) -> Pair:
    """The pair of one HF module; an embedding's factors are turned round.

    Raises:
        InputError: a factor without its partner, another shape than the base's, or another rank than recorded.
    """
    where = config.path.parent
    if set(own) not in FACTORS:
        raise InputError(f"{where}: {hf} has {', '.join(sorted(own))}; a pair of lora_A and lora_B is expected")
    if "lora_A" in own:
        a: Readable = own["lora_A"]
        b: Readable = own["lora_B"]
    else:
        a, b = Transposed(own["lora_embedding_B"]), Transposed(own["lora_embedding_A"])
    key = hf + ".weight" if config.targets_parameter(hf + ".weight") else hf
    rank, (rows, columns) = config.rank(key), entry.hf_shape(part)
    if (tuple(a.shape), tuple(b.shape)) != ((rank, columns), (rows, rank)):
        raise InputError(
            f"{where}: {hf} has A {list(a.shape)} and B {list(b.shape)}; the base and rank {rank} of {config.path.name}"
            f" ask for {[rank, columns]} and {[rows, rank]}"
        )
    return Pair(a, b, config.scaling(key))


def block_modules(blocks: Mapping[str, ExpertBlock], config: PeftConfig) -> dict[str, Module]:
    """The logical modules of experts whose pairs lie in blocks."""
    found = {}
    for block in blocks.values():
        for entry, axis, pair in expert_pairs(block, config):
            found[hf_module(entry.name)] = Module(entry, axis, [Placed(0, pair)], {})
    return found


def magnitudes(module: Module) -> InMemory:
    """DoRA's vector over a logical module's rows; NaN where a part has none."""
    parts = [
        module.magnitudes[part].read().float() if part in module.magnitudes else torch.full(shape[:1], torch.nan)
        for part, shape in ((part, module.entry.hf_shape(part)) for part in range(len(module.entry.hf)))
    ]
    return InMemory(torch.cat([parts[part][start:stop] for part, start, stop in module.axis.locate()]))


def import_settings(
    joined: Mapping[str, Joined], config: PeftConfig, table: WeightTable, modules: Mapping[str, Module]
) -> LoraSettings:
    """The settings of the joined modules; those of the config where it adapts nothing but whole tensors."""
    if not joined:
        return LoraSettings(config.r, float(config.lora_alpha), (), config.lora_dropout)
    ranks = {name: one.rank for name, one in joined.items()}
    scalings = {name: one.scaling for name, one in joined.items()}
    fused = {name: one for name, one in modules.items() if name in joined and one.axis.parts > 1}
    chosen = {name: {place.part for place in one.placed} for name, one in fused.items()}
    parts = named_parts(chosen, {name: one.entry for name, one in fused.items()})
    return replace(settings_of(ranks, scalings, table, config.lora_dropout), parts=parts)
