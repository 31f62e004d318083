"""HF folders and Megatron checkpoints: recorded references bit for bit, round trips, and damaged input."""

import argparse
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource, write_hf
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.formats.mcore_writer import write_mcore
from mindspeed_llm.checkpoint.formats.torch_file import materialise, read_torch_file, write_torch_file
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.metadata import Metadata
from mindspeed_llm.checkpoint.upstream_args import config_from_args
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.models.config import ModelConfig
from tests.checkpoint.families import TINY, make_family
from tests.checkpoint.tiny import make_hf, make_mcore
from tests.conftest import REPO

CASES = REPO.parent / "shared" / "golden" / "cases"
SKIPPED = ("_te_", "noop", "ep2", "layerbylayer")
WRITTEN = [
    path.name
    for pattern in ("B_v1_qwen3_[tu]*", "B_qwen3_[tu]*")
    for path in sorted(CASES.glob(pattern))
    if not any(word in path.name for word in SKIPPED)
] or ["(absent)"]


def option(case: dict, flag: str) -> int | None:
    """The value of an integer flag of a recorded command line."""
    return int(case["args"][case["args"].index(flag) + 1]) if flag in case["args"] else None


@pytest.mark.parametrize("name", WRITTEN)
def test_rank_files_equal_the_recorded_upstream_ones_bit_for_bit(name: str, golden: Path, tmp_path: Path) -> None:
    case = json.loads((golden / "cases" / name / "expected.json").read_text())
    source = HFSource(golden / "_hf" / case["model"])
    layout = Layout.even(
        source.config.num_layers,
        option(case, "--target-tensor-parallel-size") or 1,
        option(case, "--target-pipeline-parallel-size") or 1,
        option(case, "--num-layers-per-virtual-pipeline-stage"),
    )
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    write_mcore(source, folder, layout)
    recorded = {file: entry for file, entry in case["files"].items() if "models" in entry}
    assert {str(path.relative_to(tmp_path)) for path in folder.rglob("*.pt")} == set(recorded)
    for file, entry in recorded.items():
        written = materialise(read_torch_file(tmp_path / file))
        assert written["checkpoint_version"] == 3.0 and written["iteration"] == 1
        for key, model in entry["models"].items():
            expected = model["tensors"]
            state = written[key]
            if name.startswith("B_v1_"):
                assert list(state) == list(expected)
            for tensor, about in expected.items():
                if about == "None":
                    assert state[tensor] is None
                    continue
                digest = hashlib.sha256(state[tensor].contiguous().view(torch.uint8).numpy()).hexdigest()
                assert (list(state[tensor].shape), digest) == (about["shape"], about["sha256"]), (file, tensor)
            assert {k for k, v in state.items() if v is not None} == {k for k, v in expected.items() if v != "None"}


def test_a_recorded_checkpoint_has_the_config_and_hash_of_its_hf_folder(golden: Path) -> None:
    checkpoint = MegatronCheckpoint(golden / "cases" / "B_qwen3_tied_tp1pp1ep1" / "mg")
    source = HFSource(golden / "_hf" / "qwen3_tied")
    assert checkpoint.config == source.config
    assert content_hash(checkpoint.base()) == content_hash(source)


def test_sizes_in_the_first_converters_args_give_the_config_of_the_hf_folder(golden: Path) -> None:
    """It names no family but its layer specification; enums arrive as inert records."""
    case = json.loads((golden / "cases" / "B_v1_qwen3_untied_tp1pp2" / "expected.json").read_text())
    recorded = next(entry["args"] for entry in case["files"].values() if isinstance(entry.get("args"), dict))
    assert recorded["model_type_hf"] is None
    config = config_from_args(argparse.Namespace(**recorded), "here", torch.bfloat16)
    assert config == ModelConfig.from_hf(golden / "_hf" / "qwen3_untied")
    with pytest.raises(InputError, match="give --model-type-hf"):
        config_from_args(argparse.Namespace(**{**recorded, "spec": None}), "here", torch.bfloat16)


LAYOUTS = [(1, 1, None), (2, 1, None), (1, 2, None), (2, 2, None), (1, 4, None), (2, 2, 1), (1, 2, 1)]


@pytest.mark.parametrize("with_metadata", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp", "chunk"), LAYOUTS)
def test_hf_to_megatron_and_back_is_bit_equal_and_keeps_its_hash(
    tp: int, pp: int, chunk: int | None, tied: bool, with_metadata: bool, tmp_path: Path
) -> None:
    source = HFSource(make_hf(tmp_path / "hf", tied))
    layout = Layout.even(4, tp, pp, chunk)
    metadata = Metadata(source.config, layout) if with_metadata else None
    base = make_mcore(source, tmp_path / "mg", layout, metadata).base()
    assert base.config == source.config
    (tmp_path / "back").mkdir()
    write_hf(base, tmp_path / "back", shard_bytes=9000)
    original = load_file(tmp_path / "hf" / "model.safetensors")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(original)
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / "back" / file)[name], original[name]), name
    assert content_hash(base) == content_hash(source)


@pytest.mark.parametrize(("before", "after"), [((2, 2, 1), (1, 4, None)), ((1, 2, None), (2, 2, None))])
def test_megatron_to_megatron_is_the_same_as_from_hf(before: tuple, after: tuple, tmp_path: Path) -> None:
    source = HFSource(make_hf(tmp_path / "hf", tied=True))
    first = make_mcore(source, tmp_path / "one", Layout.even(4, *before))
    make_mcore(first.base(), tmp_path / "two", Layout.even(4, *after))
    make_mcore(source, tmp_path / "direct", Layout.even(4, *after))
    for path in sorted((tmp_path / "direct").rglob("*.pt")):
        expected = materialise(read_torch_file(path))
        found = materialise(read_torch_file(tmp_path / "two" / path.relative_to(tmp_path / "direct")))
        for key in [key for key in expected if key.startswith("model")]:
            assert list(found[key]) == list(expected[key])
            pairs = [(found[key][name], value) for name, value in expected[key].items() if value is not None]
            assert all(torch.equal(a, b) for a, b in pairs)


def test_a_run_folder_without_a_tracker_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sources = {step: HFSource(make_hf(tmp_path / str(step), seed=step)) for step in (9, 10, 100)}
    for step, source in sources.items():
        made = make_mcore(source, tmp_path / f"made{step}", Layout.even(4))
        run.mkdir(exist_ok=True)
        made.folder.rename(run / f"iter_{step:07d}")
    (run / "iter_0000200").mkdir()
    assert content_hash(MegatronCheckpoint(run).base()) == content_hash(sources[100])


def test_megatron_core_prefixes_and_missing_extra_state_are_tolerated(tmp_path: Path) -> None:
    source = HFSource(make_hf(tmp_path / "hf"))
    make_mcore(source, tmp_path / "mg", Layout.even(4))
    path = next((tmp_path / "mg").rglob("*.pt"))
    content = materialise(read_torch_file(path))
    content["model"] = {f"module.{name}": value for name, value in content["model"].items() if value is not None}
    write_torch_file(path, content)
    assert content_hash(MegatronCheckpoint(tmp_path / "mg").base()) == content_hash(source)


def test_different_weights_have_different_hashes(tmp_path: Path) -> None:
    one, other = (HFSource(make_hf(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    assert content_hash(one) != content_hash(other)
    assert content_hash(one) == content_hash(one, threads=1)


def edit(folder: Path, change: object) -> Path:
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_missing_unknown_and_misshapen_hf_tensors_are_named(tmp_path: Path) -> None:
    norm = "model.norm.weight"
    with pytest.raises(InputError, match=r"1 tensors are missing \['model\.norm"):
        HFSource(edit(make_hf(tmp_path / "a"), lambda tensors: tensors.pop(norm)))
    with pytest.raises(InputError, match=r"1 are unknown .*\['surprise"):
        HFSource(edit(make_hf(tmp_path / "b"), lambda tensors: tensors.update(surprise=torch.ones(1))))
    with pytest.raises(InputError, match=r"has shape \[3\], config.json asks for \[24\]"):
        HFSource(edit(make_hf(tmp_path / "c"), lambda tensors: tensors.update({norm: torch.ones(3)})))


def test_a_stored_output_layer_of_a_tied_model_must_be_the_embedding(tmp_path: Path) -> None:
    def add(tensors: dict, shift: float) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + shift

    HFSource(edit(make_hf(tmp_path / "same", tied=True), lambda tensors: add(tensors, 0)))
    with pytest.raises(InputError, match="tie_word_embeddings"):
        HFSource(edit(make_hf(tmp_path / "other", tied=True), lambda tensors: add(tensors, 1)))


@pytest.mark.parametrize("keep", [4, 100, 0.5, 0.999])
def test_truncated_safetensors_are_input_errors(keep: float, tmp_path: Path) -> None:
    path = make_hf(tmp_path / "hf") / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(InputError, match="truncated"):
        HFSource(tmp_path / "hf")


def test_shards_missing_twice_stored_or_outside_the_folder_are_refused(tmp_path: Path) -> None:
    source = HFSource(make_hf(tmp_path / "hf"))
    write_hf(source, tmp_path / "hf", shard_bytes=9000)
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert content_hash(HFSource(tmp_path / "hf")) == content_hash(source.__class__(make_hf(tmp_path / "again")))
    index = tmp_path / "hf" / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text(good.replace("model-00001-of", "../model-00001-of", 1))
    with pytest.raises(InputError, match="outside the folder"):
        HFSource(tmp_path / "hf")
    index.write_text(good)
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(InputError, match="lists it"):
        HFSource(tmp_path / "hf")
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(InputError, match="stored twice"):
        HFSource(tmp_path / "hf")


def test_damaged_megatron_folders_name_what_is_wrong(tmp_path: Path) -> None:
    source = HFSource(make_hf(tmp_path / "hf"))
    make_mcore(source, tmp_path / "mg", Layout.even(4, 2, 2))
    folder = tmp_path / "mg" / "iter_0000001"
    (tmp_path / "mg" / "latest_checkpointed_iteration.txt").write_text("9")
    with pytest.raises(InputError, match="says 9"):
        MegatronCheckpoint(tmp_path / "mg")
    with pytest.raises(InputError, match="no such folder"):
        MegatronCheckpoint(tmp_path / "nowhere")
    (folder / "mp_rank_01_001").rename(tmp_path / "kept")
    with pytest.raises(InputError, match="mp_rank_01_001"):
        MegatronCheckpoint(folder)
    (folder / "mp_rank_01_000").rename(tmp_path / "kept2")
    with pytest.raises(InputError, match="args say tensor_model_parallel_size 2, the folders show 1"):
        MegatronCheckpoint(folder)
    (tmp_path / "kept").rename(folder / "mp_rank_01_001")
    (tmp_path / "kept2").rename(folder / "mp_rank_01_000")
    path = folder / "mp_rank_01_001" / "model_optim_rng.pt"
    content = materialise(read_torch_file(path))
    content["model"]["decoder.final_layernorm.weight"] = torch.ones(3)
    write_torch_file(path, content)
    with pytest.raises(InputError, match=r"final_layernorm.weight has shape \[3\], TP2 PP2 asks for \[24\]"):
        MegatronCheckpoint(folder)


def test_a_size_that_does_not_divide_leaves_nothing_behind(tmp_path: Path) -> None:
    source = HFSource(make_hf(tmp_path / "hf"))
    folder = tmp_path / "mg"
    folder.mkdir()
    with pytest.raises(UsageError, match="num_query_groups 2 is not divisible"):
        write_mcore(source, folder, Layout.even(4, tp=4))
    assert not list(folder.iterdir())


def test_other_tensors_kept_per_parameter_are_read_at_any_layout(tmp_path: Path) -> None:
    """Optimizer state saved per rank under local names comes back in logical shape."""
    source = HFSource(make_hf(tmp_path / "hf"))
    checkpoint = make_mcore(source, tmp_path / "mg", Layout.even(4, 2, 2, 1))
    for path in sorted((tmp_path / "mg").rglob("*.pt")):
        content = materialise(read_torch_file(path))
        doubled = {
            key: {name: value.float() * 2 for name, value in content[key].items() if value is not None}
            for key in ("model0", "model1")
        }
        write_torch_file(path, {**content, "optimizer": {"exp_avg": doubled}})
    section = MegatronCheckpoint(checkpoint.folder).section("optimizer", "exp_avg")
    for name in source.names():
        assert torch.equal(section.read(name), source.read(name).float() * 2)
    with pytest.raises(InputError, match="optimizer/exp_avg_sq"):
        MegatronCheckpoint(checkpoint.folder).section("optimizer", "exp_avg_sq")


@pytest.mark.parametrize("name", list(TINY))
def test_rank_files_describe_every_family_without_an_args_json(name: str, tmp_path: Path) -> None:
    source = HFSource(make_family(name, tmp_path / "hf"))
    checkpoint = make_mcore(source, tmp_path / "mg", Layout.even(4, 2, 2))
    assert checkpoint.metadata is None and checkpoint.config == source.config
    assert content_hash(checkpoint.base()) == content_hash(source)
