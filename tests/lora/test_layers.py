"""One adapted layer, both forms, with and without bias, against torch's autograd on the unsplit matrices."""

import numpy
import pytest
import torch

from tests.distributed.cases import Arrays
from tests.distributed.compare import assert_close
from tests.distributed.pool import pool
from tests.lora.problem import Linear, Outcome

SEQUENCE, ROWS, INPUT, OUTPUT, RANK = 6, 3, 10, 14, 4
CASES = [
    Linear(kind, tensor, sequence, fused, bias, skip)
    for kind in ("column", "row")
    for tensor, sequence in ((1, False), (2, False), (2, True))
    for fused in (True, False)
    for bias, skip in ((False, False), (True, False), (True, True))
]


def problem() -> Arrays:
    """Random matrices, an input and an output gradient."""
    generator = numpy.random.default_rng(3)
    shapes = {
        "x": (SEQUENCE, ROWS, INPUT),
        "dy": (SEQUENCE, ROWS, OUTPUT),
        "w": (OUTPUT, INPUT),
        "bias": (OUTPUT,),
        "a": (RANK, INPUT),
        "b": (OUTPUT, RANK),
    }
    return {name: generator.standard_normal(shape).astype(numpy.float32) for name, shape in shapes.items()}


def closed_form(linear: Linear, values: Arrays) -> Arrays:
    """Y = X W^T + bias + scaling (X A^T) B^T and its gradients."""
    full = {name: torch.from_numpy(value).requires_grad_(name in "xab") for name, value in values.items()}
    out = full["x"] @ full["w"].t() + linear.scaling * (full["x"] @ full["a"].t()) @ full["b"].t()
    if linear.bias and not linear.skip_bias_add:
        out = out + full["bias"]
    out.backward(full["dy"])
    found = {"out": out.detach(), "dx": full["x"].grad, "da": full["a"].grad, "db": full["b"].grad}
    if linear.skip_bias_add:
        found["bias"] = full["bias"]
    return {name: value.numpy() for name, value in found.items()}


def put_together(linear: Linear, outcomes: list[Outcome]) -> Arrays:
    """Every rank's tensors as whole ones."""
    column, sequence = linear.kind == "column", linear.sequence_parallel
    # name -> the axis ranks share; "sum" where each has seen its own tokens only; None where all hold the same
    between = 0 if sequence else None
    axes = {
        "out": 2 if column else between,
        "dx": between if column else 2,
        "da": ("sum" if sequence else None) if column else 1,
        "db": 0 if column else ("sum" if sequence else None),
        "bias": 0 if column else None,
    }
    whole = {}
    for name in outcomes[0].tensors:
        shares = [outcome.tensors[name] for outcome in outcomes]
        if axes[name] is None:
            assert all(numpy.array_equal(share, shares[0]) for share in shares), name
            whole[name] = shares[0]
        elif axes[name] == "sum":
            whole[name] = sum(shares)
        else:
            whole[name] = numpy.concatenate(shares, axis=axes[name])
    return whole


@pytest.mark.distributed
@pytest.mark.parametrize("linear", CASES, ids=str)
def test_an_adapted_layer_equals_its_closed_form(linear: Linear) -> None:
    values = problem()
    outcomes = pool(linear.tensor).run("tests.lora.worker:one_layer", linear=linear, values=values)
    found, expected = put_together(linear, outcomes), closed_form(linear, values)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert_close(found[name], value, name)
