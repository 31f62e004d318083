"""Injection: the same initial values at every layout, the right parameters trainable, the right marks."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy
import pytest
import torch

from mindspeed_llm.models.config import ModelConfig
from tests.distributed.cases import SIZES, Arrays, Case
from tests.distributed.compare import whole
from tests.distributed.pool import pool
from tests.distributed.reference import saved_model
from tests.distributed.test_layouts import SP, VPP

pytestmark = pytest.mark.distributed
ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def injected(case: Case, targets: tuple[str, ...] = ALL, seed: int = 1) -> list[SimpleNamespace]:
    model = ModelConfig.from_hf(saved_model(False))
    return pool(case.world).run("tests.lora.worker:injected", case=case, model=model, targets=targets, seed=seed)


def factors(reports: Sequence[SimpleNamespace], tensor: int) -> Arrays:
    shares: dict[str, dict[int, numpy.ndarray]] = {}
    for report in reports:
        for name, value in report.factors.items():
            held = shares.setdefault(name, {}).setdefault(report.tp, value)
            assert numpy.array_equal(held, value), f"{name}: replicas differ over DP"
    return {name: whole(name, [share[rank] for rank in range(tensor)]) for name, share in shares.items()}


@pytest.mark.parametrize(
    "case",
    [
        Case(world=2, tensor=2),
        Case(world=2, **SP),
        Case(world=2, pipeline=2),
        Case(world=2, **VPP),
        Case(world=2),
        Case(world=4, pipeline=2, **SP),
    ],
    ids=str,
)
def test_initial_values_do_not_depend_on_the_layout(case: Case) -> None:
    expected, found = factors(injected(Case()), 1), factors(injected(case), case.tensor)
    assert set(found) == set(expected)
    assert [name for name, value in expected.items() if not numpy.array_equal(found[name], value)] == []


def test_b_is_zero_and_every_a_is_drawn_apart_within_its_bound() -> None:
    found = factors(injected(Case()), 1)
    assert len(found) == SIZES.layers * len(ALL) * 2
    first = set()
    for name, value in found.items():
        if ".lora_B." in name:
            assert not value.any(), name
            continue
        bound = value.shape[1] ** -0.5
        assert bound * 0.8 < numpy.abs(value).max() <= bound, name
        first.add(float(value[0, 0]))
    assert len(first) == SIZES.layers * len(ALL)


def test_the_seed_changes_every_a() -> None:
    one, other = (factors(injected(Case(), seed=seed), 1) for seed in (1, 2))
    assert not [n for n in one if ".lora_A." in n and (one[n] == other[n]).any()]


def test_the_distribution_is_that_of_pefts_initialisation() -> None:
    shape = (64, 50)
    found = pool(1).run("tests.lora.worker:drawn", shape=shape, seed=5)[0]
    peft = torch.empty(400, 50)
    torch.nn.init.kaiming_uniform_(peft, a=5**0.5)  # what peft does to lora_A
    assert numpy.abs(found).max() <= 50**-0.5
    assert abs(float(numpy.abs(found).max()) - float(peft.abs().max())) < 1e-3
    assert abs(found.mean()) < 4 * found.std() / found.size**0.5
    assert abs(found.std() / float(peft.std()) - 1) < 0.05
    assert numpy.array_equal(found, pool(1).run("tests.lora.worker:drawn", shape=shape, seed=5)[0])


def test_only_the_adapters_of_the_targets_are_trainable() -> None:
    report = injected(Case(), targets=("linear_proj", "linear_fc1"))[0]
    expected = {
        f"decoder.layers.{layer}.{module}.lora_{factor}.weight"
        for layer in range(SIZES.layers)
        for module in ("self_attention.linear_proj", "mlp.linear_fc1")
        for factor in "AB"
    }
    assert report.trainable == expected == set(report.factors)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_split_factors_are_marked_split_and_replicated_ones_partial_under_sequence_parallelism(
    sequence_parallel: bool,
) -> None:
    report = injected(Case(world=2, tensor=2, sequence_parallel=sequence_parallel))[0]
    column = {name for name in report.factors if "linear_qkv" in name or "linear_fc1" in name}
    split = {n for n in report.factors if (".lora_B." in n) == (n in column)}
    assert report.split & set(report.factors) == split
    marked = report.sequence_parallel & set(report.factors)
    assert marked == (set(report.factors) - split if sequence_parallel else set())
