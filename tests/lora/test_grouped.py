"""Experts computed together give what they give one after another, whatever their adapters are."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import pytest

from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.checkpoint.open import open_base
from mindspeed_llm.lora.config import unlike_layers
from tests.distributed.cases import SIZES, Arrays, Case
from tests.distributed.compare import assert_close, reference_of
from tests.distributed.pool import pool

if TYPE_CHECKING:
    from tests.lora.grouped_worker import Seen

pytestmark = pytest.mark.distributed
MODULAR = Case(model="qwen3-moe", fused=False)
FORMS = [replace(MODULAR, fused=fused, apart=apart) for fused in (False, True) for apart in (False, True)]
LAYERS = 4


def seen(cases: list[Case], **settings: Any) -> "list[Seen]":
    """What the cases' engines give; settings: of `LoraSettings`."""
    truth = reference_of(MODULAR)
    targets = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    lora = LoraSettings(SIZES.rank, SIZES.alpha, targets, **settings)
    arguments = {"folder": truth.folder, "step": truth.steps[0], "settings": lora}
    return pool(1).run("tests.lora.grouped_worker:run", cases=cases, **arguments)[0]


def assert_alike(found: Arrays, wanted: Arrays) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert_close(found[name], value, name)


def test_together_equals_apart_in_both_forms_and_so_does_the_base_without_its_adapters() -> None:
    together, apart, fused, fused_apart = seen(FORMS)
    assert (together.together, apart.together, fused.together) == (LAYERS, 0, LAYERS)
    for one in (together, fused, fused_apart):
        assert_alike(one.gradients, apart.gradients)
        for found, wanted in zip(one.base, apart.base, strict=True):
            assert_close(found, wanted, "logits of the base")


def test_with_dropout_both_forms_drop_the_same_rows_of_all_experts() -> None:
    modular, fused = seen([FORMS[0], FORMS[2]], dropout=0.3)
    plain = seen([FORMS[0]])[0]
    assert_alike(fused.gradients, modular.gradients)
    name = "decoder.layers.3.mlp.experts.local_experts.2.linear_fc1.lora_A.weight"
    assert not numpy.allclose(modular.gradients[name], plain.gradients[name], rtol=0.1)


def test_experts_that_are_not_adapted_alike_run_one_after_another() -> None:
    odd = "decoder.layers.2.mlp.experts.local_experts.5.linear_fc1"
    together, apart = seen(FORMS[:2], rank_pattern={odd: SIZES.rank + 2})
    assert together.together == LAYERS - 1
    targets = ("linear_qkv", "linear_fc1")
    model = open_base(reference_of(MODULAR).folder).config
    assert unlike_layers(LoraSettings(3, 7.0, targets), model) == []
    assert unlike_layers(LoraSettings(3, 7.0, targets, rank_pattern={odd: 5}), model) == [2]
    assert unlike_layers(LoraSettings(3, 7.0, (*targets, odd.replace("fc1", "fc2"))), model) == [2]
    assert_alike(together.gradients, apart.gradients)


def test_in_bfloat16_together_is_as_near_to_float32_as_apart() -> None:
    exact = seen([FORMS[1]])[0].gradients
    together, apart = seen([replace(form, dtype="bfloat16") for form in FORMS[2:]])

    def error(found: "Seen") -> float:
        parts = [numpy.linalg.norm(found.gradients[name] - value) / numpy.linalg.norm(value) for name, value in
                 exact.items() if value.any()]  # fmt: skip
        return float(numpy.median(parts))

    assert error(together) <= 1.1 * error(apart)
