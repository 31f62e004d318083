"""What training stores of an adapter beyond A and B, and the same adapter as everybody else reads it.

PiSSA (Meng et al., arXiv 2404.02948) trains A and B from the largest singular vectors of W, which it takes out of W.
Here the base stays as it is, and what is taken out is stored beside the factors, as A_start and B_start:

    W - s B_start A_start + s B A  =  W + s [B, -B_start] [A; A_start]        an adapter of twice the rank

DoRA's lengths are stored as vectors beside the factors; others read them from `LoraSource.magnitudes`.
"""

import dataclasses
import re

import torch

from mindspeed_llm.checkpoint.adapters.factors import AdapterTensors, Joined, Pair, Placed, join, logical_tensors
from mindspeed_llm.checkpoint.adapters.parts import adapted_rows
from mindspeed_llm.checkpoint.adapters.replaced import SourceTensor
from mindspeed_llm.checkpoint.adapters.settings import settings_of
from mindspeed_llm.checkpoint.adapters.source import LoraSource
from mindspeed_llm.checkpoint.formats.lazy import InMemory, Readable
from mindspeed_llm.checkpoint.kinds import AxisMap, Segment
from mindspeed_llm.checkpoint.tables import LORA_NAME, MAGNITUDE


def show_stored(lora: LoraSource) -> LoraSource:
    """An adapter as training stored it, shown as pairs of factors, magnitudes and whole tensors."""
    matches = [match for name in lora.tensors.names() if (match := LORA_NAME.match(name))]
    starts = {match["module"] for match in matches if match["factor"] == "lora_A_start"}
    magnitudes = {match["module"]: lengths(lora, match) for match in matches if match["factor"] == MAGNITUDE}
    if not starts and not magnitudes:
        return lora
    joined = {module: joined_pair(lora, module, module in starts) for module in lora.modules()}
    whole: dict[str, Readable] = {name: SourceTensor(lora.tensors, name) for name in lora.whole()}
    table, settings = lora.tensors.table, lora.settings
    if starts:
        ranks = {module: one.rank for module, one in joined.items()}
        scalings = {module: one.scaling for module, one in joined.items()}
        settings = dataclasses.replace(
            settings_of(ranks, scalings, table, settings.dropout),
            modules_to_save=settings.modules_to_save,
            parts=settings.parts,
        )
    return dataclasses.replace(
        lora,
        tensors=AdapterTensors(lora.path, table, logical_tensors(joined, whole, table)),
        settings=settings,
        magnitudes=magnitudes,
        stored=lora.tensors,
        stored_settings=lora.settings,
    )


def lengths(lora: LoraSource, match: re.Match[str]) -> Readable:
    """The stored lengths of a module's rows, NaN for those of parts that are not adapted."""
    stored, rows = SourceTensor(lora.tensors, match[0]), rows_of(lora, match["module"])
    return stored if rows is None else InMemory(torch.where(rows, stored.read().float(), torch.nan))


def rows_of(lora: LoraSource, module: str) -> torch.Tensor | None:
    """The rows of a module that an adapter changes, bool [o]; None for all."""
    return adapted_rows(lora.settings, module, lora.tensors.table.entries[f"{module}.weight"])


def joined_pair(lora: LoraSource, module: str, started: bool) -> Joined:
    """The pair of one module; where it `started` from factors, they are taken away again."""
    a, b = (SourceTensor(lora.tensors, f"{module}.{factor}.weight") for factor in ("lora_A", "lora_B"))
    scaling = lora.settings.scaling(module)
    if not started:
        return Joined(a, b, scaling)
    a_start, b_start = (
        SourceTensor(lora.tensors, f"{module}.{factor}.weight") for factor in ("lora_A_start", "lora_B_start")
    )
    rows = b.shape[0]
    axis = AxisMap(0, (Segment(0, 0, rows),), (0,))
    placed = [Placed(0, Pair(a, b, scaling)), Placed(0, Pair(a_start, b_start, -scaling))]
    return join(axis, rows, placed)


def with_stored(lora: LoraSource, saved: tuple[str, ...]) -> LoraSource:
    """An adapter of other origin with what training needs to go on from it, as far as training can.

    DoRA's lengths become tensors where every adapted row of every module has one; other rows' are not used.

    Args:
        saved: logical modules that were trained whole.
    """
    found = {module: one.read() for module, one in lora.magnitudes.items()}
    rows = {module: rows_of(lora, module) for module in found}
    own = [values if rows[module] is None else values[rows[module]] for module, values in found.items()]
    dora = bool(own) and set(found) == set(lora.modules()) and not any(one.isnan().any() for one in own)
    if not saved and not dora:
        return lora
    names = lora.tensors.names()
    tensors: dict[str, Readable] = {name: SourceTensor(lora.tensors, name) for name in names}
    if dora:
        tensors |= {f"{module}.{MAGNITUDE}.weight": InMemory(one.nan_to_num(1.0)) for module, one in found.items()}
    settings = dataclasses.replace(lora.settings, use_dora=dora, modules_to_save=saved)
    stored = AdapterTensors(lora.path, lora.tensors.table, tensors)
    return dataclasses.replace(lora, stored=stored, stored_settings=settings)
