"""Several adapters as one: the weighted sum of what each of them does, to the bit where nothing has to be folded."""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from mindspeed_llm.checkpoint.adapters.combine import combine
from mindspeed_llm.checkpoint.adapters.export import write_peft
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.merge import MergedSource
from mindspeed_llm.checkpoint.metadata import BaseRecord
from mindspeed_llm.checkpoint.open import open_lora
from mindspeed_llm.errors import InputError, UsageError
from tests.checkpoint.peft_tiny import adapt, load, logits, qwen3, same_logits, transformers_of

FIRST = {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"]}
SECOND = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base with two adapters of different targets, ranks and scalings."""
    folder = qwen3(tmp_path / "base")
    adapt(folder, tmp_path / "first", seed=1, **FIRST)
    adapt(folder, tmp_path / "second", seed=2, **SECOND)
    return folder


def test_a_combination_computes_the_weighted_sum_of_its_adapters(base: Path, tmp_path: Path) -> None:
    """The judge is peft's own stacking of ranks (`combination_type="cat"`)."""
    model = PeftModel.from_pretrained(load(base), tmp_path / "first", "first", autocast_adapter_dtype=False)
    model.load_adapter(tmp_path / "second", "second", autocast_adapter_dtype=False)
    model.add_weighted_adapter(["first", "second"], [0.7, 0.4], "both", combination_type="cat")
    model.set_adapter("both")
    expected = logits(model)
    source = HFSource(base)
    both = combine([(open_lora(tmp_path / name, base=source), weight) for name, weight in weights(0.7, 0.4)])
    same_logits(logits(transformers_of(MergedSource(source, both), base, tmp_path / "merged")), expected)
    write_peft(both, tmp_path / "both", str(base))
    again = open_lora(tmp_path / "both", base=source)
    same_logits(logits(transformers_of(MergedSource(source, again), base, tmp_path / "again")), expected)


def weights(*values: float) -> list[tuple[str, float]]:
    """The two adapters' folders with weights."""
    return list(zip(("first", "second"), values, strict=True))


@pytest.mark.parametrize("values", [(1.0, 1.0), (0.25, -2.0), (0.3, 1.7), (0.0, 0.5)])
def test_the_products_add_up_in_exact_arithmetic(values: tuple[float, float], base: Path, tmp_path: Path) -> None:
    source = HFSource(base)
    opened = [(open_lora(tmp_path / name, base=source), weight) for name, weight in weights(*values)]
    both = combine(opened)
    for module in both.modules():
        expected = sum(weight * product(lora, module) for lora, weight in opened if module in lora.modules())
        torch.testing.assert_close(product(both, module), expected, rtol=3e-7, atol=3e-7)


def product(lora: object, module: str) -> torch.Tensor:
    """scaling * B @ A in float64."""
    a, b = (lora.tensors.read(f"{module}.{factor}.weight").double() for factor in ("lora_A", "lora_B"))
    return lora.settings.scaling(module) * (b @ a)


def test_a_single_weight_changes_alpha_and_no_factor(base: Path, tmp_path: Path) -> None:
    lora = open_lora(tmp_path / "first", base=HFSource(base))
    half = combine([(lora, 0.5)])
    for module in lora.modules():
        assert half.settings.scaling(module) == lora.settings.scaling(module) / 2
    assert all(torch.equal(half.tensors.read(name), lora.tensors.read(name)) for name in lora.tensors.names())


def test_what_has_no_weighted_sum_is_refused(base: Path, tmp_path: Path) -> None:
    source = HFSource(base)
    first = open_lora(tmp_path / "first", base=source)
    with pytest.raises(UsageError, match="every weight is 0"):
        combine([(first, 0.0)])
    adapt(base, tmp_path / "whole", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    whole = open_lora(tmp_path / "whole", base=source)
    assert combine([(first, 0.5), (whole, 1)]).whole() == ["output_layer.weight"]
    with pytest.raises(InputError, match="replaces output_layer.weight whole"):
        combine([(first, 1), (whole, 0.5)])
    with pytest.raises(InputError, match="replace the same tensors"):
        combine([(whole, 1), (whole, 1)])
    adapt(base, tmp_path / "dora", r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(InputError, match="DoRA"):
        combine([(first, 1), (open_lora(tmp_path / "dora", base=source), 1)])
    one, other = (dataclasses.replace(first, base=BaseRecord("x", digit * 64)) for digit in "12")
    with pytest.raises(InputError, match="different bases .content 111111111111 and 222222222222"):
        combine([(one, 1), (other, 1)])
