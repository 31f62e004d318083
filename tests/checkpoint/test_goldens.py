"""The recorded conversions of upstream's two converters, run by their own command lines: every tensor bit-equal."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_llm.checkpoint.convert import main
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.formats.torch_file import materialise, read_torch_file
from mindspeed_llm.errors import InputError, UsageError
from tests.conftest import REPO

CASES = REPO.parent / "shared" / "golden" / "cases"
PREDICTION_EXTRAS = {"mtp.layers.0.embed_tokens.weight", "mtp.layers.0.output_layer.weight"}
"""A prediction layer's own embedding and head, which upstream loses, are kept under names of their own."""
DEFECTS = {
    "B_llama_tp3": "cuts the vocabulary and the heads into ragged shares; refused here",
    "B_llama_as_qwen3": "fails with a KeyError; refused here",
    "B_llama_numlayer_vpp4": "fails with a ValueError; here all layers of a stage are one chunk, as without the flag",
    "B_llama_oddvocab_tp2": "cuts 259 rows into 130 and 129; here the last row is repeated, as by the first converter",
    "B_llama_tp4": "cuts inside a query group; refused here",
    "B_qwen3_untied_pp2noop4_odd": "fails with an IndexError; refused here",
    "B_qwen2_as_llama2": "drops the biases of q, k and v; refused here",
    "B_qwen3_untied_tp1pp1ep2": "writes the files of a dense model twice for two expert ranks; refused here",
    "B_qwen2_tied_tp1pp1ep2": "writes the files of a dense model twice for two expert ranks; refused here",
    "B_qwen3_moe_tp2ep2_extend_nogg": "scrambles ungrouped experts spread over tensor ranks on the way back",
    "B_deepseek3_mtpmodel_nomtp": "drops the prediction layer without a word; here --mtp-num-layers 0 asks for it",
}


def cases(prefix: str, *but: str) -> list[str]:
    """Recorded conversions from HF, by name; one that says so where the recordings are absent."""
    names = [path.name for path in sorted(CASES.glob(f"{prefix}*"))]
    names = [name for name in names if not name.startswith(but)]
    return names or ["(absent)"]


def recorded(golden: Path, name: str) -> dict:
    """What upstream wrote."""
    return json.loads((golden / "cases" / name / "expected.json").read_text())


def command(case: dict, golden: Path, folder: Path) -> list[str]:
    """The recorded words with this test's folders in them."""
    places = {"${HF}": golden / "_hf", "${TOK}": golden / "_tok", "${CASE}": folder}
    words = list(case["args"])
    for mark, place in places.items():
        words = [word.replace(mark, str(place)) for word in words]
    return words


def digest(values: torch.Tensor) -> str:
    """sha256 of a tensor's bytes."""
    return hashlib.sha256(values.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def check_files(case: dict, folder: Path, first_converter: bool) -> None:
    """Every recorded tensor is there, bit for bit, and no other but a prediction layer's own tables."""
    files = {file: entry for file, entry in case["files"].items() if "models" in entry}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.pt")} == set(files)
    for file, entry in files.items():
        written = materialise(read_torch_file(folder / file))
        assert written["checkpoint_version"] == 3.0 and written["iteration"] == 1
        for key, model in entry["models"].items():
            state = {name: value for name, value in written[key].items() if value is not None}
            expected = {name: about for name, about in model["tensors"].items() if about != "None"}
            assert set(state) - set(expected) <= PREDICTION_EXTRAS and not set(expected) - set(state), (file, key)
            for name, about in expected.items():
                found = (list(state[name].shape), digest(state[name]))
                assert found == (about["shape"], about["sha256"]), (file, key, name)
            if first_converter:
                assert set(model["tensors"]) - set(expected) <= set(written[key])


FROM_HF = [name for name in cases("B_", "B_lora", "B_v2_on_v1") if name not in DEFECTS]


@pytest.mark.parametrize("name", FROM_HF)
def test_the_recorded_command_writes_the_recorded_tensors_and_leads_back(
    name: str, golden: Path, tmp_path: Path
) -> None:
    case = recorded(golden, name)
    assert case["status"] == "ok"
    assert main(command(case, golden, tmp_path)) == 0
    check_files(case, tmp_path / "mg", name.startswith("B_v1_"))
    words = ["--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", str(tmp_path / "mg")]
    assert main([*words, "--save-dir", str(tmp_path / "hf")]) == 0
    original = {
        key: value
        for path in sorted((golden / "_hf" / case["model"]).glob("*.safetensors"))
        for key, value in load_file(path).items()
    }
    back = load_file(tmp_path / "hf" / "model.safetensors")
    assert set(back) == set(original) and all(torch.equal(back[key], original[key]) for key in original)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("B_llama_tp3", "not divisible by tensor parallel size 3"),
        ("B_llama_tp4", "num_query_groups 2 is not divisible by tensor parallel size 4"),
        ("B_llama_as_qwen3", "--model-type-hf says qwen3"),
        ("B_qwen3_untied_pp2noop4_odd", "5 layers are not divisible by pipeline parallel size 2"),
        ("B_qwen2_as_llama2", "--model-type-hf says llama2"),
        ("B_qwen3_untied_tp1pp1ep2", "the model has no experts"),
        ("B_qwen2_tied_tp1pp1ep2", "the model has no experts"),
    ],
)
def test_what_upstream_gets_wrong_is_refused(name: str, message: str, golden: Path, tmp_path: Path) -> None:
    if not (golden / "cases" / name).is_dir():
        pytest.skip(f"{name} is not among the recordings here")
    with pytest.raises((UsageError, InputError), match=message):
        main(command(recorded(golden, name), golden, tmp_path))
    assert not any(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("name", ["B_llama_oddvocab_tp2"])
def test_an_odd_vocabulary_is_padded_as_the_first_converter_pads_it(name: str, golden: Path, tmp_path: Path) -> None:
    assert main(command(recorded(golden, name), golden, tmp_path)) == 0
    check_files(recorded(golden, name.replace("B_llama", "B_v1_llama")), tmp_path / "mg", first_converter=True)


@pytest.mark.parametrize("path", [p.parent for p in sorted(CASES.glob("B_*/mg"))] or ["(absent)"], ids=str)
def test_recorded_checkpoints_open_and_lead_back_to_their_hf_folder(
    path: Path | str, golden: Path, tmp_path: Path
) -> None:
    case = json.loads((Path(path) / "expected.json").read_text())
    if (Path(path) / "lora").is_dir() or "lora" in Path(path).name:
        pytest.skip("adapters have tests of their own")
    family = None if case["model"].startswith("qwen3") else "llama"  # the first converter's args name no family
    checkpoint = MegatronCheckpoint(Path(path) / "mg", family)
    assert not checkpoint.missing_base, case["case"]
