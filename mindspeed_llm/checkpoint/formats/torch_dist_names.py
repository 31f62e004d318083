"""What megatron-core's `torch_dist` checkpoints call logical tensors.

The names are those of its sharded state dicts (megatron-core 0.16.1), of which there are three forms:

    stacked     decoder.layers.self_attention.linear_proj.weight [layers, ...]; the usual one
    per layer   decoder.layers.3.self_attention.linear_proj.weight; where layers differ (`non_homogeneous_layers`)
    singletons  per layer, experts apart, gate and up apart as `_w` and `_v` (`singleton_local_shards`)

Experts lie along an axis of their own (after the layers' one) or, as singletons, under their global number:
mlp.experts.experts.linear_fc1.weight [layers, experts, ...] or mlp.experts.experts.7.linear_fc1.weight. A norm goes by
its own name or by that of the linear layer after it. Prediction layers are never stacked; Megatron gives them no
embedding and output layer of their own.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from mindspeed_llm.checkpoint.formats.mcore_names import ENGINE_NORMS
from mindspeed_llm.checkpoint.tables import EMBEDDING, OUTPUT_LAYER, Entry, WeightTable
from mindspeed_llm.models.families.base import Kind

LAYERS = re.compile(r"^decoder\.layers\.(\d+)\.")
LOCAL_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")
HALVES = ("_w", "_v")
OPTIMIZER = re.compile(r"^(optimizer\.|chained_\d+\.)")
SHARED = re.compile(r"^mtp\.layers\.\d+\.(embed_tokens|output_layer)\.weight$")
WRAPPER = re.compile(r"^(module\.)+")
NO_EXTRA_STATE = ("word_embeddings", "embed_tokens", "output_layer", "router", "experts")
"""Modules that keep no `_extra_state`."""


class Form(NamedTuple):
    """One way to name tensors.

    Attributes:
        stacked: layers share tensors.
        singletons: every expert has tensors of its own, and gate and up are apart.
    """

    stacked: bool = True
    singletons: bool = False


FORMS = (Form(), Form(stacked=False), Form(stacked=False, singletons=True))


class Spelling(NamedTuple):
    """Where a logical tensor lies.

    Attributes:
        keys: one, or two for the halves of a gated tensor.
        axes: sizes of the leading axes.
        place: along the leading axes.
    """

    keys: tuple[str, ...]
    axes: tuple[int, ...]
    place: tuple[int, ...]


def spell(entry: Entry, form: Form, name: str | None = None) -> Spelling:
    """Where a logical tensor lies in a form; `name` replaces the entry's, layer and expert numbers being kept."""
    name = name or entry.name
    axes: list[int] = []
    place: list[int] = []
    layer = LAYERS.match(name)
    if form.stacked and layer:
        name = "decoder.layers." + name[layer.end() :]
        axes.append(entry.config.num_layers)
        place.append(int(layer[1]))
    expert = LOCAL_EXPERT.search(name)
    if expert:
        number = f"{expert[1]}." if form.singletons else ""
        name = f"{name[: expert.start()]}.experts.experts.{number}{name[expert.end() :]}"
        if not form.singletons:
            axes.append(entry.config.num_experts)
            place.append(int(expert[1]))
    halved = form.singletons and entry.kind is Kind.GATED
    return Spelling(tuple(name + half for half in HALVES) if halved else (name,), tuple(axes), tuple(place))


def other_names(name: str) -> list[str]:
    """The names megatron-core knows a tensor by besides its logical one."""
    return [name.removesuffix(ours) + theirs for ours, theirs in ENGINE_NORMS if name.endswith(ours)]


def spellings(entry: Entry) -> Iterator[Spelling]:
    """Every place a logical tensor may lie at, the usual one first."""
    for form in FORMS:
        for name in (entry.name, *other_names(entry.name)):
            yield spell(entry, form, name)
    if shared := SHARED.match(entry.name):
        yield Spelling((EMBEDDING if shared[1] == "embed_tokens" else OUTPUT_LAYER,), (), ())


def form_of(table: WeightTable) -> Form:
    """The form megatron-core gives a model by itself: stacked where all layers have the same tensors."""
    layers = [
        {(entry.name.replace(f".{layer}.", ".", 1), entry.shape) for entry in table.of_layer[layer]}
        for layer in range(table.config.num_layers)
    ]
    return Form(stacked=all(layer == layers[0] for layer in layers))


def extra_state_keys(entry: Entry, form: Form) -> Iterator[str]:
    """The keys of the (empty) `_extra_state` that megatron-core's modules ask for beside a weight.

    Its own linear layers ask, and with transformer_engine norms and the attention's core.
    """
    module, _, kind = entry.name.rpartition(".")
    if kind != "weight" or module.rpartition(".")[2] in NO_EXTRA_STATE:
        return
    modules = [module]
    if module.endswith(".self_attention.linear_proj"):
        modules.append(module.removesuffix("linear_proj") + "core_attention")
    for one in modules:
        found = spell(entry, Form(form.stacked, form.singletons), one + "._extra_state")
        place, axes = found.place or (0,), found.axes or (1,)
        key = found.keys[0].removesuffix(HALVES[0])
        yield f"{key}/shard_{'.'.join(map(str, place))}_{'.'.join(map(str, axes))}"
