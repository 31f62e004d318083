"""The fused forms compute what the modular ones do, with and without chunks, dropout and a gradient of the input."""

from dataclasses import replace

import numpy
import pytest
import torch
from torch.nn.functional import silu

from tests.distributed.cases import Arrays
from tests.distributed.compare import assert_close
from tests.distributed.pool import pool
from tests.lora.layer import Layer, Report

pytestmark = pytest.mark.distributed
PLACES = ((1, False), (2, False), (2, True))
BASIC = [
    *(Layer(kind, tensor, sp) for kind in ("column", "row", "mlp") for tensor, sp in PLACES),
    *(Layer(kind, tensor, expert=True) for kind in ("column", "row") for tensor in (1, 2)),
]
WITH_CHUNKS = [replace(layer, chunk_bytes=1) for layer in BASIC if layer.tensor > 1 and not layer.expert]
WITH_DROPOUT = [replace(layer, dropout=0.3) for layer in (*BASIC, *WITH_CHUNKS)]
FIRST = [replace(layer, input_grad=False) for layer in (*BASIC, *WITH_CHUNKS)]
ALL = [*BASIC, *WITH_CHUNKS, *WITH_DROPOUT, *FIRST]


def values(layer: Layer) -> Arrays:
    """Random matrices, an input and an output gradient for a layer of this size."""
    generator = numpy.random.default_rng(5)
    mlp = layer.kind == "mlp"
    outputs = layer.inputs if mlp else layer.outputs
    wide = 2 * layer.ffn if mlp else outputs
    shapes = {
        "x": (layer.length, layer.rows, layer.inputs),
        "dy": (layer.length, layer.rows, outputs),
        "w": (wide, layer.inputs),
        "a": (layer.rank, layer.inputs),
        "b": (wide, layer.rank),
        "w2": (outputs, layer.ffn),
        "a2": (layer.rank, layer.ffn),
        "b2": (outputs, layer.rank),
    }
    return {name: generator.standard_normal(shape).astype(numpy.float32) for name, shape in shapes.items()}


def reports(layers: list[Layer]) -> dict[Layer, list[Report]]:
    """Every layer's reports, by rank; one task per number of processes and kind."""
    found: dict[Layer, list[Report]] = {}
    for key in dict.fromkeys((layer.tensor, layer.kind == "mlp") for layer in layers):
        some = [layer for layer in layers if (layer.tensor, layer.kind == "mlp") == key]
        by_rank = pool(key[0]).run("tests.lora.layer_worker:run", layers=some, values=values(some[0]))
        found |= {layer: [ranks[i] for ranks in by_rank] for i, layer in enumerate(some)}
    return found


@pytest.fixture(scope="module")
def seen() -> dict[Layer, list[Report]]:
    """Reports of all layers in both forms."""
    return reports([*ALL, *(layer.modular for layer in ALL)])


@pytest.mark.parametrize("layer", ALL, ids=str)
def test_output_and_gradients_equal_the_modular_forms(layer: Layer, seen: dict[Layer, list[Report]]) -> None:
    for fused, modular in zip(seen[layer], seen[layer.modular], strict=True):
        assert set(fused.tensors) == set(modular.tensors)
        assert ("dx" in fused.tensors) == layer.input_grad
        for name, value in modular.tensors.items():
            assert_close(fused.tensors[name], value, name)


def dropped(x: torch.Tensor, report: Report, number: int) -> torch.Tensor:
    return x * torch.from_numpy(report.masks[number]["mask"])


@pytest.mark.parametrize("layer", [one for one in WITH_DROPOUT if one.tensor == 1 and not one.expert], ids=str)
def test_dropout_touches_the_adapters_input_only_as_pefts_does(layer: Layer, seen: dict[Layer, list[Report]]) -> None:
    report = seen[layer][0]
    full = {name: torch.from_numpy(value) for name, value in values(layer).items()}
    full = {name: value.requires_grad_(name in ("x", "a", "b", "a2", "b2")) for name, value in full.items()}

    def linear(x: torch.Tensor, number: str, mask: int) -> torch.Tensor:
        w, a, b = (full[f"{name}{number}"] for name in "wab")
        return x @ w.t() + layer.scaling * (dropped(x, report, mask) @ a.t()) @ b.t()

    out = linear(full["x"], "", 0)
    if layer.kind == "mlp":
        gate, up = out.chunk(2, -1)
        out = linear(silu(gate) * up, "2", 1)
    out.backward(full["dy"])
    expected = {"out": out.detach(), "dx": full["x"].grad, "da1": full["a"].grad, "db1": full["b"].grad}
    if layer.kind == "mlp":
        expected |= {"da2": full["a2"].grad, "db2": full["b2"].grad}
    for name, value in expected.items():
        assert_close(report.tensors[name], value.numpy(), name)


@pytest.mark.parametrize("layer", [one for one in WITH_DROPOUT if one.tensor == 2], ids=str)
def test_equal_inputs_are_dropped_alike_and_shares_apart(layer: Layer, seen: dict[Layer, list[Report]]) -> None:
    first, second = (report.masks[0]["mask"] for report in seen[layer])
    shares = layer.kind == "row" or (layer.sequence_parallel and not layer.expert)
    assert (first == second).all() != shares
    for fused, modular in zip(seen[layer], seen[layer.modular], strict=True):
        for one, other in zip(fused.masks, modular.masks, strict=True):
            assert (one["mask"] == other["mask"]).all()


def test_masks_keep_the_right_share_scale_it_up_and_differ_by_call_and_rank() -> None:
    size, p = 100_000, 0.3
    ranks = pool(2).run("tests.lora.layer_worker:dropped_shares", size=size, p=p)
    masks = [*ranks[0].own, *ranks[1].own, *ranks[0].shared[1:]]
    for mask in masks:
        assert set(numpy.unique(mask)) == {numpy.float32(0), numpy.float32(1 / numpy.float32(1 - p))}
        assert abs((mask > 0).mean() - (1 - p)) < 4 * (p * (1 - p) / size) ** 0.5
    for i, one in enumerate(masks):
        for other in masks[:i]:
            together = ((one > 0) & (other > 0)).mean()
            assert abs(together - (1 - p) ** 2) < 5 * ((1 - p) / size) ** 0.5
    for a, b in zip(ranks[0].shared, ranks[1].shared, strict=True):
        assert (a == b).all()


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (1, 1)])
def test_seeds_agree_over_tensor_parallelism_and_differ_over_stages_and_replicas(tensor: int, pipeline: int) -> None:
    first, second = pool(2).run("tests.lora.layer_worker:first_draw", tensor=tensor, pipeline=pipeline)
    assert (first == second) == (tensor == 2)


def change(layer: Layer, numbers: Arrays, dtype: str) -> numpy.ndarray:
    """What the adapter changes of the output."""
    without = {**numbers, "b": 0 * numbers["b"]}
    sums = []
    for one in (numbers, without):
        ranks = pool(layer.tensor).run("tests.lora.layer_worker:run", layers=[replace(layer, dtype=dtype)], values=one)
        outs = [ranks_[0].tensors["out"].astype(numpy.float64) for ranks_ in ranks]
        axis = 2 if layer.kind == "column" else 0 if layer.sequence_parallel else None
        sums.append(outs[0] if axis is None else numpy.concatenate(outs, axis=axis))
    return sums[0] - sums[1]


@pytest.mark.parametrize("layer", [Layer("column", 1), Layer("row", 2), Layer("row", 2, True)], ids=str)
def test_a_small_adapter_survives_bf16_as_well_as_in_the_modular_form(layer: Layer) -> None:
    layer = replace(layer, length=32, inputs=128, outputs=128)
    rounded = {k: torch.from_numpy(v).bfloat16().float().numpy() for k, v in values(layer).items()}
    ratio = numpy.linalg.norm(rounded["w"]) / numpy.linalg.norm(rounded["b"] @ rounded["a"]) / layer.scaling
    small = rounded["b"] * ratio * 2**-10
    rounded["b"] = torch.from_numpy(small).bfloat16().float().numpy()
    exact = layer.scaling * (rounded["x"].astype(numpy.float64) @ rounded["a"].T) @ rounded["b"].T
    errors = {}
    for form in (layer, layer.modular):
        errors[form.fused] = numpy.linalg.norm(change(form, rounded, "bfloat16") - exact) / numpy.linalg.norm(exact)
    x, w, a, b = (torch.from_numpy(rounded[name]).bfloat16() for name in "xwab")
    folded = (x @ (w + layer.scaling * (b @ a)).t()).double() - (x @ w.t()).double()
    error_of_folding = numpy.linalg.norm(folded.numpy() - exact) / numpy.linalg.norm(exact)
    assert errors[True] <= 1.02 * errors[False]
    assert errors[True] < 0.7 * error_of_folding
