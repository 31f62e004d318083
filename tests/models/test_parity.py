"""Every dense family, live on megatron-core, against transformers: logits, generation with a cache, training, TP."""

import copy

import numpy
import pytest
import torch

from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.lazy import InMemory, assemble
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families import FAMILIES
from mindspeed_llm.models.families.base import Kind
from tests.distributed.cases import Case
from tests.distributed.pool import pool
from tests.models.families import DENSE
from tests.models.parity import Tiny, assert_equal, folder, model_of, ours, reference, tokens

BY_NAME = {tiny.name: tiny for tiny in DENSE}
CACHED = [
    "qwen3 tied, biases, yarn", "qwen2 window", "llama 3.1", "llama dynamic below", "mistral window",
    "gemma2 small caps, untied", "gemma3", "glm4", "phi3 longrope beyond", "phi3 partial longrope, window",
]  # fmt: skip
SPLIT = ["glm4", "seed-oss all biases", "gemma2 small caps, untied", "phi3 partial longrope, window"]
TRAINED = [
    "qwen2 window", "llama biases", "gemma2", "gemma2 small caps, untied", "gemma3", "glm4", "phi3 longrope beyond"
]  # fmt: skip


@pytest.mark.parametrize("tiny", DENSE, ids=str)
def test_logits_equal_transformers(tiny: Tiny) -> None:
    assert_equal(ours(tiny)[0], reference(tiny))


def test_every_dense_family_has_a_tiny_model_here() -> None:
    here = {ModelConfig.from_hf(folder(tiny)).family for tiny in DENSE}
    assert here == {one.name for one in FAMILIES if not any("{expert}" in row.name for row in one.weights)}


@pytest.mark.parametrize("name", CACHED)
def test_a_sequence_given_to_a_cache_piece_by_piece_equals_transformers_on_the_whole(name: str) -> None:
    tiny, cuts = BY_NAME[name], (9, 10, 13, 16, 17, 18, 20, 21, 22)
    rows = torch.from_numpy(tokens(tiny))
    pieces = ours(tiny, "cached_logits", cuts=cuts, swap_at=3)[0]
    for found, length in zip(pieces, (*cuts, tiny.length), strict=True):
        with torch.no_grad():
            wanted = model_of(tiny)(rows[:, :length], use_cache=False).logits[:, -1].numpy()
        assert_equal(found, wanted)


def transformers_training(tiny: Tiny) -> tuple[numpy.ndarray, dict[str, torch.Tensor]]:
    """transformers' loss of each next token [position, row], and the gradient of its mean by our logical names."""
    model, rows = model_of(tiny), torch.from_numpy(tokens(tiny))
    model.zero_grad()
    logits = model(rows, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    losses.mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    table = WeightTable(ModelConfig.from_hf(folder(tiny)))
    named: dict[str, torch.Tensor] = {}
    for entry in table.entries.values():
        named[entry.name] = assemble([InMemory(grads[hf.name]) for hf in entry.hf], entry.hf_map())
    return losses.detach().t().flatten().numpy(), named


@pytest.mark.parametrize("name", TRAINED)
def test_losses_and_gradients_equal_transformers(name: str) -> None:
    tiny = BY_NAME[name]
    wanted_losses, wanted = transformers_training(tiny)
    losses, grads = ours(tiny, "losses_and_gradients")[0]
    assert numpy.abs(losses - wanted_losses).max() <= 1e-5 * max(1, wanted_losses.std())
    assert set(grads) == set(wanted)
    for entry, gradient in wanted.items():
        error = numpy.linalg.norm(grads[entry] - gradient.numpy()) / numpy.linalg.norm(gradient.numpy())
        assert error <= 1e-5, (entry, error)


@pytest.mark.parametrize("name", ["gemma2 small caps, untied", "llama biases"])
def test_a_frozen_output_layer_gives_the_same_losses_and_gradients(name: str) -> None:
    tiny = BY_NAME[name]
    losses, grads = ours(tiny, "losses_and_gradients")[0]
    again, some = ours(tiny, "losses_and_gradients", frozen=["output_layer.weight"])[0]
    assert set(grads) - set(some) == {"output_layer.weight"}
    assert numpy.abs(again - losses).max() <= 1e-5
    for entry, gradient in some.items():
        assert numpy.linalg.norm(gradient - grads[entry]) <= 1e-5 * numpy.linalg.norm(grads[entry]), entry


@pytest.mark.parametrize(
    "name", ["gemma2 small caps, untied", "gemma3", "glm4", "phi3 longrope beyond", "llama biases"]
)
def test_bf16_is_as_close_to_fp32_as_transformers_bf16(name: str) -> None:
    tiny = BY_NAME[name]
    with torch.no_grad():
        theirs = copy.deepcopy(model_of(tiny)).bfloat16()(torch.from_numpy(tokens(tiny)), use_cache=False).logits
    errors = [numpy.abs(one - reference(tiny)).mean() for one in (ours(tiny, "logits_bf16")[0], theirs.float().numpy())]
    assert 0 < errors[0] <= 1.2 * errors[1]


RECOMPUTE = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective"},
}


@pytest.mark.parametrize("how", RECOMPUTE)
@pytest.mark.parametrize("name", ["gemma2 small caps, untied", "gemma3"])
def test_recomputed_activations_give_the_same_gradients(name: str, how: str) -> None:
    tiny = BY_NAME[name]
    losses, grads = ours(tiny, "losses_and_gradients")[0]
    again, found = ours(tiny, "losses_and_gradients", **RECOMPUTE[how])[0]
    assert numpy.array_equal(again, losses) and set(found) == set(grads)
    for entry, gradient in grads.items():
        assert numpy.linalg.norm(found[entry] - gradient) <= 1e-6 * numpy.linalg.norm(gradient), entry


@pytest.mark.distributed
@pytest.mark.parametrize("name", SPLIT)
def test_logits_equal_transformers_at_tensor_parallel_2(name: str) -> None:
    tiny = BY_NAME[name]
    for found in ours(tiny, world=2, tensor=2):
        assert_equal(found, reference(tiny))


@pytest.mark.distributed
@pytest.mark.parametrize("name", SPLIT)
def test_replicated_parameters_are_marked_partial_and_the_others_split(name: str) -> None:
    source = HFSource(folder(BY_NAME[name]))
    case = Case(world=2, tensor=2, sequence_parallel=True)
    (chunk,) = pool(2).run("tests.models.worker:chunk_facts", case=case, model=source.config)[0]
    replicated = {entry.name for entry in source.table.entries.values() if entry.kind is Kind.REPLICATED}
    assert chunk.partial == replicated
    assert chunk.split == set(source.names()) - replicated
