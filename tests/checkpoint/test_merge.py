"""Adapters: opened at any layout, merged to the closed form, refused on the wrong base."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from mindspeed_llm.checkpoint import merge
from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.lazy import narrow
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.merge import MergedSource
from mindspeed_llm.checkpoint.metadata import BaseRecord, LoraSettings
from mindspeed_llm.checkpoint.open import adapter_of, check_base, open_base, open_lora
from mindspeed_llm.errors import InputError, UsageError
from tests.checkpoint.peft_tiny import adapt, load, qwen3
from tests.checkpoint.tiny import TARGETS, make_hf, make_mcore, random_adapter, write_adapter

SETTINGS = LoraSettings(3, 7.0, TARGETS)


def exact_merge(base: HFSource, factors: dict[str, torch.Tensor], name: str, scaling: float) -> torch.Tensor:
    """W + scaling * B @ A in float64."""
    module = name.removesuffix(".weight")
    weight = base.read(name).double()
    if f"{module}.lora_A.weight" not in factors:
        return weight
    a, b = (factors[f"{module}.{factor}.weight"].double() for factor in ("lora_A", "lora_B"))
    return weight + scaling * (b @ a)


def closed_form(base: HFSource, factors: dict[str, torch.Tensor], name: str, scaling: float) -> torch.Tensor:
    """`exact_merge`, rounded once."""
    return exact_merge(base, factors, name, scaling).to(base.dtype(name))


def steps_apart(one: torch.Tensor, other: torch.Tensor) -> int:
    """Largest distance in representable bf16 values."""

    def ordered(values: torch.Tensor) -> torch.Tensor:
        bits = values.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((ordered(one) - ordered(other)).abs().max())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp", "chunk"), [(1, 1, None), (2, 1, None), (2, 2, 1), (1, 4, None)])
def test_an_adapter_at_any_layout_merges_to_the_closed_form(
    tp: int, pp: int, chunk: int | None, tied: bool, tmp_path: Path
) -> None:
    base = HFSource(make_hf(tmp_path / "hf", tied, dtype="float32"))
    factors = random_adapter(base.table)
    folder = write_adapter(tmp_path / "lora", base.table, factors, Layout.even(4, tp, pp, chunk), SETTINGS)
    lora = open_lora(folder)
    assert lora.settings == SETTINGS
    merged = MergedSource(base, lora)
    for name in base.names():
        torch.testing.assert_close(merged.read(name), closed_form(base, factors, name, 7 / 3), rtol=1e-6, atol=1e-6)
        assert torch.equal(merged.read(name, [(2, 5)]), merged.read(name)[2:5])


def test_a_bf16_merge_is_the_closed_form_rounded_once(tmp_path: Path) -> None:
    base = HFSource(make_hf(tmp_path / "hf"))
    factors = random_adapter(base.table)
    merged = MergedSource(base, open_lora(write_adapter(tmp_path / "l", base.table, factors, Layout.even(4), SETTINGS)))
    differing = total = 0
    for name in base.names():
        expected, found = closed_form(base, factors, name, 7 / 3), merged.read(name)
        assert found.dtype == torch.bfloat16 and steps_apart(found, expected) <= 1
        differing += int((found != expected).sum())
        total += found.numel()
    assert differing <= total * 1e-3  # only ties that float32 and float64 break differently


def test_the_merge_has_the_same_bits_from_every_pair_of_layouts(tmp_path: Path) -> None:
    source = HFSource(make_hf(tmp_path / "hf", tied=True))
    factors = random_adapter(source.table)
    hashes = set()
    for number, (of_base, of_lora) in enumerate(
        [((1, 1), (2, 2)), ((2, 2), (1, 1)), ((1, 4), (2, 1)), ((2, 1), (1, 2))]
    ):
        base = make_mcore(source, tmp_path / f"mg{number}", Layout.even(4, *of_base)).base()
        folder = write_adapter(tmp_path / f"lora{number}", source.table, factors, Layout.even(4, *of_lora), SETTINGS)
        hashes.add(content_hash(MergedSource(base, open_lora(folder))))
    assert len(hashes) == 1


@pytest.mark.parametrize("rows", [[(0, 1)], [(3, 9), (20, 21)], [(17, 24), (0, 5), (5, 7)], []])
@pytest.mark.parametrize("columns", [None, [(0, 22)], [(22, 44)], [(40, 44), (1, 3)]])
def test_a_box_has_the_values_of_the_whole_whatever_the_tiles(
    rows: list, columns: list | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiles of 7 rows and 9 columns every box crosses several; fresh sources share nothing they remember."""
    monkeypatch.setattr(merge, "TILE_COLUMNS", 9)
    monkeypatch.setattr(merge, "TILE_ELEMENTS", 63)
    base = HFSource(make_hf(tmp_path / "hf"))
    lora = open_lora(write_adapter(tmp_path / "l", base.table, random_adapter(base.table), Layout.even(4), SETTINGS))
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    expected = narrow(MergedSource(base, lora).read(name), rows, columns)
    found = MergedSource(base, lora).read(name, rows, columns)
    assert torch.equal(found, expected) and found.shape == expected.shape


def test_a_merge_reads_and_computes_only_the_tiles_a_box_touches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "TILE_COLUMNS", 9)
    monkeypatch.setattr(merge, "TILE_ELEMENTS", 63)
    base = HFSource(make_hf(tmp_path / "hf"))
    lora = open_lora(write_adapter(tmp_path / "l", base.table, random_adapter(base.table), Layout.even(4), SETTINGS))
    read, elements = HFSource.read, []

    def watched(source: HFSource, *box: object) -> torch.Tensor:
        values = read(source, *box)
        elements.append(values.numel())
        return values

    monkeypatch.setattr(HFSource, "read", watched)
    MergedSource(base, lora).read("decoder.layers.1.mlp.linear_fc2.weight", [(6, 8)], [(8, 10)])
    assert elements == [63] * 4


def test_one_rounding_comes_closer_to_the_exact_merge_than_peft(tmp_path: Path) -> None:
    """Base and adapter in bf16: peft rounds B @ A, its scaling and the sum, we round once."""
    base = qwen3(tmp_path / "base", dtype=torch.bfloat16)
    adapt(base, tmp_path / "adapter", r=8, lora_alpha=12, target_modules="all-linear")
    source = HFSource(base)
    lora = open_lora(tmp_path / "adapter", base=source)
    ours = MergedSource(source, lora)
    theirs = PeftModel.from_pretrained(load(base), tmp_path / "adapter", autocast_adapter_dtype=False)
    theirs = theirs.merge_and_unload().state_dict()
    factors = {name: lora.tensors.read(name) for name in lora.tensors.names()}
    errors = {"ours": [], "theirs": []}
    for hf, (entry, part) in source.table.hf_names.items():
        if f"{entry.name.removesuffix('.weight')}.lora_A.weight" not in factors:
            continue
        exact = exact_merge(source, factors, entry.name, 1.5)
        ranges = entry.hf_map().part_ranges(part)
        step = 2.0 ** (torch.frexp(narrow(exact, ranges)).exponent - 8)
        errors["ours"].append(((narrow(ours.read(entry.name), ranges) - narrow(exact, ranges)) / step).abs())
        errors["theirs"].append(((theirs[hf].double() - narrow(exact, ranges)) / step).abs())
    mean = {who: torch.cat([one.flatten() for one in found]).mean().item() for who, found in errors.items()}
    worst = {who: max(one.max().item() for one in found) for who, found in errors.items()}
    print(f"error in bf16 steps, mean and worst: ours {mean['ours']:.3f} {worst['ours']:.2f}, peft {mean['theirs']:.3f}"
          f" {worst['theirs']:.2f}")  # fmt: skip
    assert worst["ours"] <= 0.501 and mean["ours"] < 0.26
    assert worst["theirs"] > 0.6 and mean["theirs"] > 1.05 * mean["ours"]


def test_a_cast_that_would_overflow_float16_is_refused(tmp_path: Path) -> None:
    base = HFSource(make_hf(tmp_path / "hf"))
    assert MergedSource(base, None, torch.float16).read("decoder.final_layernorm.weight").dtype == torch.float16
    module = "decoder.layers.0.mlp.linear_fc2"
    factors = {
        f"{module}.lora_A.weight": torch.full((3, 44), 300.0),
        f"{module}.lora_B.weight": torch.full((24, 3), 300.0),
    }
    folder = write_adapter(tmp_path / "l", base.table, factors, Layout.even(4), LoraSettings(3, 3, ("linear_fc2",)))
    with pytest.raises(InputError, match="does not fit float16"):
        MergedSource(base, open_lora(folder), torch.float16).read(f"{module}.weight")


GOLDEN = [
    ("B_lora_indep_filtered_qwen3_tp2pp1", "mg", "lora"),
    ("B_lora_indep_qwen3_tp2pp1", "mg", "lora"),
    ("B_lora_unified_fp32lora_qwen3", "mg_lora", "mg_lora"),
    ("B_lora_unified_qwen3_tp2pp2", "mg_lora", "mg_lora"),
    ("B_lora_unified_qwen2", "mg_lora", "mg_lora"),
    # Here the adapter's folder holds another base than --load-dir; upstream silently takes the former, so do we if
    # that folder is named as the base. Naming the other one is refused (next test).
    ("B_lora_indep_changedbase_qwen3", "lora", "lora"),
]


@pytest.mark.parametrize(("name", "base_folder", "lora_folder"), GOLDEN)
def test_recorded_merges_lie_within_two_bf16_steps(name: str, base_folder: str, lora_folder: str, golden: Path) -> None:
    """Upstream rounds B @ A, the scaling and the sum; recomputing that gives its recorded sums, ours lies close by.

    A step is that of the larger summand: where W and the delta cancel, the difference keeps their rounding errors.
    """
    case = golden / "cases" / name
    expected = {}
    for entry in json.loads((case / "expected.json").read_text())["files"].values():
        expected.update(entry.get("tensors", {}))
    lora = adapter_of(MegatronCheckpoint(case / lora_folder), alpha=16)
    base = open_base(case / base_folder, with_adapter=True)
    assert lora.settings == LoraSettings(8, 16.0, tuple(sorted(TARGETS)))
    merged = MergedSource(base, lora)
    recorded = 0
    for hf, (entry, part) in base.table.hf_names.items():
        ranges = entry.hf_map().part_ranges(part)
        weight, ours = base.read(entry.name, ranges), merged.read(entry.name, ranges)
        module = entry.name.removesuffix(".weight")
        theirs, largest = weight, weight.float().abs()
        if f"{module}.lora_A.weight" in lora.tensors.names():
            a, b = (lora.tensors.read(f"{module}.{factor}.weight") for factor in ("lora_A", "lora_B"))
            delta = (b.float() @ a.float()).to(weight.dtype)[torch.cat([torch.arange(*one) for one in ranges])]
            scaled = delta * lora.settings.scaling(module)
            theirs, largest = weight + scaled, torch.maximum(largest, scaled.float().abs())
        step = 2.0 ** (torch.frexp(largest).exponent - 8)
        assert ((ours.float() - theirs.float()).abs() <= 2 * step).all(), hf
        digest = hashlib.sha256(theirs.contiguous().view(torch.uint8).numpy()).hexdigest()
        recorded += digest == expected[hf]["sha256"]
    assert recorded == len(expected)


def test_an_adapter_that_carries_another_base_is_refused(golden: Path) -> None:
    """Recorded defect: upstream merges into the base inside the adapter's folder, whatever --load-dir says."""
    case = golden / "cases" / "B_lora_indep_changedbase_qwen3"
    with pytest.raises(InputError, match="trained on the base .*give that base"):
        check_base(open_lora(case / "lora", alpha=16), open_base(case / "mg"), case / "mg")


def test_an_adapter_of_another_base_or_model_is_refused(tmp_path: Path) -> None:
    base, other = HFSource(make_hf(tmp_path / "a")), HFSource(make_hf(tmp_path / "b", seed=9))
    record = BaseRecord("a", content_hash(base))
    factors = random_adapter(base.table)
    lora = open_lora(write_adapter(tmp_path / "l", base.table, factors, Layout.even(4), SETTINGS, base=record))
    check_base(lora, base, "a")
    with pytest.raises(InputError, match="give that base"):
        check_base(lora, other, "b")
    with pytest.raises(InputError, match="num_layers 4 and 2"):
        check_base(lora, HFSource(make_hf(tmp_path / "c", layers=2)), "c")


def test_flags_that_contradict_the_recorded_settings_are_refused(tmp_path: Path) -> None:
    base = HFSource(make_hf(tmp_path / "a"))
    folder = write_adapter(tmp_path / "l", base.table, random_adapter(base.table), Layout.even(4), SETTINGS)
    assert open_lora(folder, r=3, alpha=7, target_modules=list(reversed(TARGETS))).settings == SETTINGS
    with pytest.raises(UsageError, match="--lora-r says 16, the adapter says 3"):
        open_lora(folder, r=16)
    with pytest.raises(UsageError, match=r"--lora-alpha says 32, the adapter says 7"):
        open_lora(folder, alpha=32)
    with pytest.raises(UsageError, match="--lora-target-modules"):
        open_lora(folder, target_modules=["linear_qkv"])


def test_a_foreign_adapter_shows_rank_and_targets_but_alpha_must_be_given(golden: Path) -> None:
    folder = golden / "cases" / "B_lora_indep_filtered_qwen3_tp2pp1" / "lora"
    with pytest.raises(InputError, match="--lora-alpha"):
        open_lora(folder)
    with pytest.raises(UsageError, match="--lora-r says 4, the adapter says 8"):
        open_lora(folder, r=4, alpha=16)


def test_folders_without_what_was_asked_for_say_so(golden: Path, tmp_path: Path) -> None:
    case = golden / "cases" / "B_lora_indep_filtered_qwen3_tp2pp1"
    with pytest.raises(InputError, match="holds no LoRA weights"):
        open_lora(case / "mg", alpha=16)
    with pytest.raises(InputError, match="a LoRA adapter without its base"):
        open_base(case / "lora")
    with pytest.raises(InputError, match="holds LoRA weights beside the base"):
        open_base(golden / "cases" / "B_lora_unified_qwen3_tp2pp2" / "mg_lora")
    with pytest.raises(InputError, match="no such folder"):
        open_base(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no model"):
        open_base(tmp_path)
