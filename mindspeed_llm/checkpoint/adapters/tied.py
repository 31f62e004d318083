"""Adapters on a base whose output layer is its embedding: whether the two stay one.

peft puts a copy or a pair of factors on one of the two modules and leaves the other alone, unless it is told to keep
them tied (`ensure_weight_tying`). A tensor saved without a copy (`save_embedding_layers`) and rows of trained tokens
go into the shared table itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NoReturn

from mindspeed_llm.checkpoint.adapters.factors import Joined, same_values
from mindspeed_llm.checkpoint.adapters.peft_config import PeftConfig
from mindspeed_llm.checkpoint.adapters.settings import hf_module
from mindspeed_llm.checkpoint.formats.lazy import Readable
from mindspeed_llm.checkpoint.tables import EMBEDDING, OUTPUT_LAYER, WeightTable
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig


def untied_model(config: ModelConfig) -> ModelConfig:
    """The description of a model with an output layer of its own."""
    raw = {**config.hf_config, "tie_word_embeddings": False} if config.hf_config else {}
    return replace(config, tie_word_embeddings=False, hf_config=raw)


def lookup_unties(config: ModelConfig, modules: Iterable[str]) -> bool:
    """Whether an adapter of training makes a tied base's embedding and output layer differ.

    Args:
        modules: the logical modules it has factors of: the embedding's change what is looked up, as in peft.
    """
    return config.tie_word_embeddings and hf_module(EMBEDDING) in modules


@dataclass
class Ends:
    """What an adapter does, by logical name; `resolve_tie` takes the output layer out of it where it stays tied."""

    joined: dict[str, Joined]
    replaced: dict[str, Readable]

    def pair(self, name: str) -> Joined | None:
        """The pair on a vocabulary table."""
        return self.joined.get(hf_module(name))


def resolve_tie(ends: Ends, config: PeftConfig, table: WeightTable) -> bool:
    """Whether the output layer and the embedding differ with this adapter; where not, only the embedding's stays.

    Raises:
        InputError: the adapter has to keep them tied, but holds different values for them.
    """
    hf = {name: table.entries[name].hf[0].name for name in (EMBEDDING, OUTPUT_LAYER)}
    # A tensor without a copy of its module goes into the shared table, whichever of the two it is named after.
    unsaved = [name for name in hf if name in ends.replaced and not config.saves(hf_module(hf[name]))]
    shared = [ends.replaced.pop(name) for name in unsaved]
    if len(shared) == 2 and not same_values(*shared):
        refuse(config, hf)
    own = {name for name in hf if name in ends.replaced or ends.pair(name)}
    unties = bool(own) and not (own == set(hf) and agree(ends))
    if unties and config.ensure_weight_tying:
        if own == set(hf):
            refuse(config, hf)
        unties = False
        move_to_embedding(ends)
    if not unties:
        drop_output_layer(ends)
    for name in hf if unties else (EMBEDDING,):
        if shared:
            ends.replaced.setdefault(name, shared[0])
    return unties


def agree(ends: Ends) -> bool:
    """Whether the output layer's and the embedding's changes are the same."""
    one, other = ends.replaced.get(EMBEDDING), ends.replaced.get(OUTPUT_LAYER)
    if (one is None) != (other is None) or (one is not None and not same_values(one, other)):
        return False
    first, second = ends.pair(EMBEDDING), ends.pair(OUTPUT_LAYER)
    if first is None or second is None:
        return first is second
    return first.scaling == second.scaling and same_values(first.a, second.a) and same_values(first.b, second.b)


def refuse(config: PeftConfig, hf: dict[str, str]) -> NoReturn:
    """`InputError`: the two ends have to be changed alike."""
    raise InputError(
        f"{config.path.parent}: holds different values for {hf[EMBEDDING]} and {hf[OUTPUT_LAYER]}, which the base"
        " ties; untie the base first"
    )


def drop_output_layer(ends: Ends) -> None:
    """Leave the output layer to the embedding."""
    ends.replaced.pop(OUTPUT_LAYER, None)
    ends.joined.pop(hf_module(OUTPUT_LAYER), None)


def move_to_embedding(ends: Ends) -> None:
    """What is said of the output layer is the embedding's where nothing is said of that."""
    if OUTPUT_LAYER in ends.replaced:
        ends.replaced.setdefault(EMBEDDING, ends.replaced[OUTPUT_LAYER])
    pair = ends.pair(OUTPUT_LAYER)
    if pair is not None:
        ends.joined.setdefault(hf_module(EMBEDDING), pair)
