"""Adapters of parts of a fused layer: of q and v but not of k, of up but not of gate.

The layer has one pair of factors. The rows of B that the other parts own are zero, and training keeps them so.
"""

from collections.abc import Collection, Mapping

import torch

from mindspeed_llm.checkpoint.adapters.settings import default_and_pattern, hf_module
from mindspeed_llm.checkpoint.metadata import LoraSettings, short_name
from mindspeed_llm.checkpoint.tables import Entry


def part_names(entry: Entry) -> list[str]:
    """The short names of a layer's HF projections: q_proj, k_proj, v_proj."""
    return [short_name(hf_module(hf.name)) for hf in entry.hf]


def adapted_parts(settings: LoraSettings, module: str, entry: Entry) -> tuple[int, ...]:
    """Numbers of the HF parts of an adapted module that its adapter changes."""
    named = settings.parts_of(module)
    return tuple(number for number, name in enumerate(part_names(entry)) if named is None or name in named)


def adapted_rows(settings: LoraSettings, module: str, entry: Entry) -> torch.Tensor | None:
    """True for the logical rows that the adapter changes, bool [o]; None where it changes all."""
    parts = adapted_parts(settings, module, entry)
    if len(parts) == len(entry.hf):
        return None
    rows = torch.zeros(entry.shape[0], dtype=torch.bool)
    for part in parts:
        for start, stop in entry.hf_map().part_ranges(part):
            rows[start:stop] = True
    return rows


def named_parts(chosen: Mapping[str, Collection[int]], entries: Mapping[str, Entry]) -> dict[str, tuple[str, ...]]:
    """`LoraSettings.parts` of modules of which these HF parts are adapted.

    Args:
        chosen: part numbers by logical module.
        entries: by logical module.
    """
    names = {}
    for module, parts in chosen.items():
        known = part_names(entries[module])
        every = len(parts) == len(known)
        names[module] = () if every else tuple(known[number] for number in sorted(parts))
    return default_and_pattern(names, ())[1]


def described_targets(settings: LoraSettings) -> list[str]:
    """The targets for people: `linear_fc2`, `linear_qkv (q_proj v_proj)`."""
    parts = {name: settings.parts_of(name) for name in sorted({*settings.target_modules, *settings.parts})}
    return [f"{name} ({' '.join(own)})" if own else name for name, own in parts.items()]
