"""The words a family page is written in: how its config maps, and one row for each kind of weight.

A row relates one megatron-core tensor, in its *logical* form (tensor parallel 1, pipeline parallel 1, global layer
number), to the Hugging Face tensors it is made of. Loading, export, conversion, merging and hashing all read the
same rows, so they cannot drift apart. This module holds data only; `mindspeed_llm.checkpoint.kinds` does the algebra.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple


class Kind(Enum):
    """How a logical tensor is made of HF tensors, and how tensor parallelism cuts it."""

    REPLICATED = "replicated"
    """One HF tensor; every rank holds all of it (norms, routers)."""
    COLUMN = "column"
    """One HF tensor; ranks hold equal blocks of rows."""
    ROW = "row"
    """One HF tensor; ranks hold equal blocks of columns."""
    VOCAB = "vocab"
    """One HF tensor; ranks hold equal blocks of rows after padding with copies of the last row."""
    QKV = "qkv"
    """Three HF tensors q, k, v; rows lie query group by query group (q rows, k rows, v rows); ranks hold groups."""
    GATED = "gated"
    """Two HF tensors gate, up; gate above up; ranks hold a block of gate above the same block of up."""


class Required(Enum):
    """The mark of a config key that has no default."""

    REQUIRED = "required"


REQUIRED = Required.REQUIRED


class HfKey(NamedTuple):
    """Where a `ModelConfig` field comes from: a key of HF's config.json, and the default in transformers."""

    key: str
    default: Any = REQUIRED


@dataclass(frozen=True)
class Weight:
    """One row of a weight table.

    Attributes:
        name: megatron-core name with `{layer}` for the global layer number.
        hf: names of the HF tensors, in the order the kind wants them.
        kind: the relation between the two and to tensor parallelism.
        shape: names of dimensions of `ModelConfig.dimensions()`.
        when: the boolean `ModelConfig` field this row depends on; a leading `!` negates it; empty means always.
    """

    name: str
    hf: tuple[str, ...]
    kind: Kind
    shape: tuple[str, ...]
    when: str = ""


@dataclass(frozen=True)
class Family:
    """One model family: names, config mapping, weight table.

    Attributes:
        name: our name, stored in checkpoints and accepted by `--model-type-hf`.
        architectures: the `architectures` entries of HF configs that belong here.
        config: `ModelConfig` field -> HF key.
        fixed: `ModelConfig` fields that are the same for the whole family.
        requires: HF key -> the only value supported here; a key left out of config.json agrees.
        weights: the table.
        aliases: other names `--model-type-hf` may use.
    """

    name: str
    architectures: tuple[str, ...]
    config: Mapping[str, HfKey]
    fixed: Mapping[str, Any]
    requires: Mapping[str, Any]
    weights: tuple[Weight, ...]
    aliases: tuple[str, ...] = field(default=())
