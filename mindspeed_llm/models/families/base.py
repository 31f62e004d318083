"""The words a family page is written in: how its config maps, and one row for each kind of weight.

A row relates one megatron-core tensor, in its *logical* form (tensor parallel 1, pipeline parallel 1, global layer
number), to the Hugging Face tensors it is made of. Loading, export, conversion, merging and hashing all read the
same rows, so they cannot drift apart. This module holds data only; `mindspeed_llm.checkpoint.kinds` does the algebra.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple


class Kind(Enum):
    """How tensor parallelism cuts a logical tensor. Experts' tensors are cut over expert tensor parallelism instead."""

    REPLICATED = "replicated"
    """Every rank holds all of it (norms, routers, the biases of row-parallel layers)."""
    COLUMN = "column"
    """Ranks hold equal blocks of rows."""
    ROW = "row"
    """Ranks hold equal blocks of columns."""
    VOCAB = "vocab"
    """Ranks hold equal blocks of rows after padding with copies of the last row."""
    QKV = "qkv"
    """Rows lie query group by query group (q rows, k rows, v rows); ranks hold whole groups."""
    GATED = "gated"
    """Gate above up; ranks hold a block of gate above the same block of up."""


class Join(Enum):
    """How a logical tensor is made of its HF tensors."""

    SAME = "same"
    """One HF tensor with the same rows."""
    QKV = "qkv"
    """Three HF tensors q, k, v."""
    GATED = "gated"
    """Two HF tensors gate, up."""
    STACKED_QKV = "stacked_qkv"
    """One HF tensor: all q rows above all k rows above all v rows (Phi-3)."""
    INTERLEAVED = "interleaved"
    """One HF tensor whose rows are gate 0, up 0, gate 1, up 1 ... (gpt-oss)."""


class Stacked(Enum):
    """How an HF tensor holds what the table has once per expert."""

    NO = "no"
    """One HF tensor per expert, or no expert's tensor at all."""
    EXPERTS = "experts"
    """One HF tensor [experts, ...]."""
    TRANSPOSED = "transposed"
    """One HF tensor [experts, columns, rows] (gpt-oss)."""


class Required(Enum):
    """The mark of a config key that has no default."""

    REQUIRED = "required"


REQUIRED = Required.REQUIRED


class HfKey(NamedTuple):
    """Where a `ModelConfig` field comes from: a key of HF's config.json, and the default in transformers."""

    key: str
    default: Any = REQUIRED


Derived = Callable[[Mapping[str, Any]], Any]
"""A `ModelConfig` field computed from HF's config.json (in the one spelling of `flatten_hf_config`)."""


@dataclass(frozen=True)
class Weight:
    """One row of a weight table.

    Attributes:
        name: megatron-core name with `{layer}` for the global layer number and `{expert}` for the global expert.
        hf: names of the HF tensors, in the order the join wants them.
        kind: how tensor parallelism cuts it.
        shape: names of dimensions of `ModelConfig.dimensions()`.
        when: features of `ModelConfig.has` this row depends on, all of them; a leading `!` negates one.
        join: how it is made of the HF tensors; left out, three are QKV, two GATED, one SAME.
        stacked: whether the HF tensor holds all experts.
        keep_dtype: `--params-dtype` does not change its type (router corrections stay float32).
    """

    name: str
    hf: tuple[str, ...]
    kind: Kind
    shape: tuple[str, ...]
    when: tuple[str, ...] = ()
    join: Join | None = None
    stacked: Stacked = Stacked.NO
    keep_dtype: bool = False

    @property
    def joined(self) -> Join:
        """`join`, or what the number of HF tensors says."""
        return self.join or {3: Join.QKV, 2: Join.GATED, 1: Join.SAME}[len(self.hf)]


@dataclass(frozen=True)
class Family:
    """One model family: names, config mapping, weight table.

    Attributes:
        name: our name, stored in checkpoints and accepted by `--model-type-hf`.
        architectures: the `architectures` entries of HF configs that belong here.
        config: `ModelConfig` field -> HF key, or a function of HF's config.
        fixed: `ModelConfig` fields that are the same for the whole family.
        requires: HF key -> the only value supported here; a key left out of config.json agrees.
        weights: the table.
        aliases: other names `--model-type-hf` may use.
        specs: names of upstream's `--spec` modules for it, without `_spec`; its own name always counts.
        converted_as: other families' names under which upstream converts it (Qwen2.5 as "llama2").
    """

    name: str
    architectures: tuple[str, ...]
    config: Mapping[str, HfKey | Derived]
    fixed: Mapping[str, Any]
    requires: Mapping[str, Any]
    weights: tuple[Weight, ...]
    aliases: tuple[str, ...] = field(default=())
    specs: tuple[str, ...] = field(default=())
    converted_as: tuple[str, ...] = field(default=())
