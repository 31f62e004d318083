"""Several adapters of one base as one: the weighted sum of their products, without rounding it.

w1 * s1 * B1 A1 + w2 * s2 * B2 A2  =  s * [B1, f * B2] [A1; A2]        s = w1 * s1,  f = w2 * s2 / s
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mindspeed_llm.checkpoint.adapters.factors import (
    AdapterTensors,
    Joined,
    Pair,
    Placed,
    join,
    logical_tensors,
    untied,
)
from mindspeed_llm.checkpoint.adapters.parts import adapted_parts, named_parts
from mindspeed_llm.checkpoint.adapters.replaced import SourceTensor
from mindspeed_llm.checkpoint.adapters.settings import settings_of
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.kinds import AxisMap, Segment
from mindspeed_llm.checkpoint.open import config_differences
from mindspeed_llm.checkpoint.tables import EMBEDDING, OUTPUT_LAYER, WeightTable
from mindspeed_llm.errors import InputError, UsageError


def combine(adapters: Sequence[tuple[LoraSource, float]]) -> LoraSource:
    """The weighted sum of adapters as one adapter, whose ranks are the sums of theirs.

    Args:
        adapters: each with its weight; a weight of 0 leaves it out.

    Raises:
        InputError: adapters of different models or bases, or one that is no sum of products (DoRA, whole tensors with a
            weight other than 1, or of two adapters).
        UsageError: no adapter is left.
    """
    kept = [(lora, weight) for lora, weight in adapters if weight]
    if not kept:
        raise UsageError("no adapter is left to merge: every weight is 0; give at least one other weight")
    if len(kept) == 1 and kept[0][1] == 1:
        return kept[0][0]
    first = kept[0][0]
    for lora, weight in kept:
        check_like(lora, first)
        check_summable(lora, weight)
    check_ends([lora for lora, _ in kept])
    replaced = {name: SourceTensor(lora.tensors, name) for lora, _ in kept for name in lora.whole()}
    if sum(len(lora.whole()) for lora, _ in kept) != len(replaced):
        raise InputError(
            f"{' and '.join(str(lora.path) for lora, _ in kept)}: replace the same tensors; merge only one"
        )
    table = untied(first.tensors.table)
    joined = joined_pairs(kept)
    tensors = AdapterTensors(
        Path(" + ".join(f"{weight:g} x {lora.path}" for lora, weight in kept)),
        first.tensors.table,
        logical_tensors(joined, replaced, table),
    )
    settings = settings_of(
        {module: one.rank for module, one in joined.items()},
        {module: one.scaling for module, one in joined.items()},
        first.tensors.table,
    )
    settings = dataclasses.replace(settings, parts=joined_parts([lora for lora, _ in kept], table))
    known = [lora.base for lora, _ in kept if lora.base and lora.base.hash] or [lora.base for lora, _ in kept]
    return LoraSource(tensors, settings, known[0], None, None, any(lora.unties for lora, _ in kept))


def joined_parts(adapters: Sequence[LoraSource], table: WeightTable) -> dict[str, tuple[str, ...]]:
    """`LoraSettings.parts` of a sum: a part is adapted where one of them adapts it."""
    entries = {module: table.entries[f"{module}.weight"] for lora in adapters for module in lora.modules()}
    chosen: dict[str, set[int]] = {module: set() for module in entries}
    for lora in adapters:
        for module in lora.modules():
            chosen[module].update(adapted_parts(lora.settings, module, entries[module]))
    return named_parts(chosen, entries)


def joined_pairs(adapters: Sequence[tuple[LoraSource, float]]) -> dict[str, Joined]:
    """Each module's pairs, weighted and stacked."""
    placed: dict[str, list[Placed]] = {}
    rows: dict[str, int] = {}
    for lora, weight in adapters:
        for module in lora.modules():
            a, b = (SourceTensor(lora.tensors, f"{module}.{factor}.weight") for factor in ("lora_A", "lora_B"))
            pair = Pair(a, b, weight * lora.settings.scaling(module))
            placed.setdefault(module, []).append(Placed(0, pair))
            rows[module] = b.shape[0]
    return {
        module: join(AxisMap(0, (Segment(0, 0, rows[module]),), (0,)), rows[module], own)
        for module, own in placed.items()
    }


def check_like(lora: LoraSource, first: LoraSource) -> None:
    """`InputError` when two adapters belong to different models, or record different bases."""
    differing = config_differences(first.tensors.config, lora.tensors.config)
    if differing:
        raise InputError(f"{first.path} and {lora.path}: adapters of different models: {differing}")
    hashes = [one.base.hash if one.base else None for one in (first, lora)]
    if None not in hashes and hashes[0] != hashes[1]:
        raise InputError(
            f"{first.path} and {lora.path}: trained on different bases (content {hashes[0][:12]} and {hashes[1][:12]});"
            " only adapters of one base can be added"
        )


def check_summable(lora: LoraSource, weight: float) -> None:
    """`InputError` for what has no weighted sum."""
    if lora.magnitudes:
        raise InputError(f"{lora.path}: a DoRA adapter cannot be weighted or added; merge it alone")
    if lora.whole() and weight != 1:
        raise InputError(
            f"{lora.path}: replaces {lora.whole()[0]} whole, which has no share of {weight:g}; give it the weight 1"
        )


def check_ends(adapters: Sequence[LoraSource]) -> None:
    """`InputError` when one adapter changes a shared embedding and output layer, and another one only one of them."""
    changed = [
        lora
        for lora in adapters
        if {*lora.whole(), *(f"{module}.weight" for module in lora.modules())} & {EMBEDDING, OUTPUT_LAYER}
    ]
    if len({lora.unties for lora in changed}) > 1:
        paths = " and ".join(str(lora.path) for lora in changed)
        raise InputError(
            f"{paths}: only one of them keeps the output layer tied to the embedding; merge them one by one"
        )
