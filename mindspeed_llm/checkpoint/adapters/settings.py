"""Which modules an adapter adapts: names of both worlds to logical modules, and settings as short as they can be."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from mindspeed_llm.checkpoint.metadata import LoraSettings, short_name
from mindspeed_llm.checkpoint.tables import Entry, WeightTable
from mindspeed_llm.errors import UsageError, unknown

ALL_LINEAR = "all-linear"
ROUTER, TOKENS = "router", "word_embeddings"
"""megatron-core's short names of a router and of the table of token embeddings."""
EXPRESSION = re.compile(r"[\\^$*+?()\[\]{}|]")
"""What makes a name a regular expression."""
GROUPS: Mapping[str, Callable[[str], bool]] = {
    ALL_LINEAR: lambda short: short.startswith("linear_"),
    "all-router": lambda short: short == ROUTER,
    "all-embedding": lambda short: short == TOKENS,
}
"""Target names that stand for all modules of a sort, told by their short names."""
T = TypeVar("T")


def module_entries(table: WeightTable) -> dict[str, Entry]:
    """The entries of all matrices, by logical module name: what LoRA can adapt."""
    return {
        name.removesuffix(".weight"): entry
        for name, entry in table.entries.items()
        if name.endswith(".weight") and len(entry.shape) == 2
    }


def hf_module(name: str) -> str:
    """The HF module of a weight: `model.layers.0.mlp.up_proj` of `model.layers.0.mlp.up_proj.weight`."""
    return name.removesuffix(".weight")


def peft_module(name: str) -> str:
    """The HF module of a weight as peft sees it: transformers 5 calls Mixtral's router otherwise than its files."""
    return hf_module(name).replace(".block_sparse_moe.gate", ".mlp.gate")


def chosen_parts(names: Sequence[str], modules: Mapping[str, Entry], flag: str) -> dict[str, set[int]]:
    """The logical modules among `modules` that names given with `flag` stand for, and which of their HF parts.

    Args:
        names: megatron-core's (`linear_qkv`), HF's (`q_proj`, a part of that), whole names of either, regular
            expressions of whole names of either, or one of `GROUPS`: `all-linear` is all linear layers within the
            decoder's layers, routers excepted.

    Raises:
        UsageError: a name matches nothing.
    """
    chosen: dict[str, set[int]] = {}
    for name in names:
        found = [
            (module, part)
            for module, entry in modules.items()
            for part, hf in enumerate(entry.hf)
            if is_named(name, module, hf_module(hf.name), flag)
        ]
        if not found:
            known = {short_name(module) for module in modules} | set(GROUPS)
            hf_names = {short_name(hf_module(hf.name)) for entry in modules.values() for hf in entry.hf}
            raise unknown(f"{flag} entry", name, sorted(known | hf_names))
        for module, part in found:
            chosen.setdefault(module, set()).add(part)
    return chosen


def check_whole(chosen: Mapping[str, set[int]], modules: Mapping[str, Entry], flag: str, why: str) -> None:
    """`UsageError` when only parts of a module are chosen.

    Args:
        why: that cannot be, for the error: "get one adapter".
    """
    for module, parts in chosen.items():
        every = modules[module].hf
        if len(parts) < len(every):
            given = " ".join(short_name(hf_module(every[part].name)) for part in sorted(parts))
            whole = " ".join(short_name(hf_module(hf.name)) for hf in every)
            raise UsageError(
                f"{flag} names {given}, but {whole} are one layer here ({short_name(module)}) and {why}; name them"
                f" all, or {short_name(module)}"
            )


def is_named(name: str, module: str, hf: str, flag: str = "--lora-target-modules") -> bool:
    """Whether a target name stands for a logical module, or for the HF module `hf` that is a part of it.

    Raises:
        UsageError: it is meant as a regular expression, and is none.
    """
    if name in GROUPS:
        return GROUPS[name](short_name(module))
    if not EXPRESSION.search(name):
        return any(known == name or known.endswith(f".{name}") for known in (module, hf))
    try:
        return any(re.fullmatch(name, known) for known in (module, hf))
    except re.error as error:
        raise UsageError(f"{flag} {name}: not a regular expression ({error})") from error


def short_targets(chosen: Iterable[str], modules: Iterable[str]) -> tuple[str, ...]:
    """Whole module names, or one short name for those of which every module of the model is chosen; sorted."""
    chosen = set(chosen)
    kinds: dict[str, list[str]] = {}
    for module in modules:
        kinds.setdefault(short_name(module), []).append(module)
    names: set[str] = set()
    for kind, members in kinds.items():
        taken = [module for module in members if module in chosen]
        names.update([kind] if len(taken) == len(members) else taken)
    return tuple(sorted(names))


def settings_of(
    ranks: Mapping[str, int], scalings: Mapping[str, float], table: WeightTable, dropout: float = 0.0
) -> LoraSettings:
    """Settings that give every module its rank and scaling; the commonest become the defaults.

    Args:
        ranks, scalings: by logical module.
    """
    rank, rank_pattern = default_and_pattern(ranks)
    alphas = {module: scalings[module] * ranks[module] for module in ranks}
    alpha, alpha_pattern = default_and_pattern(alphas)
    targets = short_targets(ranks, {**module_entries(table), **dict.fromkeys(ranks)})
    return LoraSettings(rank, alpha, targets, dropout, rank_pattern, alpha_pattern)


def default_and_pattern(values: Mapping[str, T], default: T | None = None) -> tuple[T, dict[str, T]]:
    """A default (the commonest value), and the modules with another one: by short name where all of that name agree."""
    default = Counter(values.values()).most_common(1)[0][0] if default is None else default
    pattern: dict[str, T] = {}
    for kind, group in itertools.groupby(sorted(values, key=lambda name: (short_name(name), name)), key=short_name):
        members = list(group)
        found = {values[module] for module in members}
        if len(found) > 1:
            pattern.update({module: values[module] for module in members if values[module] != default})
        elif found != {default}:
            pattern[kind] = found.pop()
    return default, pattern
