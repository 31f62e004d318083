"""Experts and prediction layers between HF folders and live models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.checkpoint.formats.hf import HFSource, write_hf
from mindspeed_llm.checkpoint.layout import ExpertShare, Layout
from mindspeed_llm.checkpoint.live import live_tensors, load_live, local_slice
from mindspeed_llm.checkpoint.metadata import Metadata
from mindspeed_llm.checkpoint.tables import WeightTable, expert_number, logical_name
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig
from tests.checkpoint.tiny import make_mcore
from tests.distributed.pool import pool
from tests.models.tiny_moe import DEEPSEEK_V3, EVERY, GLM4_MOE, QWEN3_MOE, Tiny, reference, saved, tokens

FC1 = "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc1.weight"
FC2 = "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc2.weight"


def hub_folder(one: Tiny, folder: Path) -> Path:
    """The saved model with the prediction layer the hub's files have and transformers leaves out."""
    shutil.copytree(saved(one), folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(8)
    for name, (entry, part) in WeightTable(ModelConfig.from_hf(folder)).hf_names.items():
        if name not in tensors:
            tensors[name] = torch.randn(entry.stored_shape(part), generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("one", EVERY, ids=str)
def test_every_family_is_written_back_as_it_was_read(one: Tiny, tmp_path: Path) -> None:
    write_hf(HFSource(saved(one)), tmp_path)
    before, after = load_file(saved(one) / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("one", [DEEPSEEK_V3, GLM4_MOE], ids=str)
def test_prediction_layers_are_carried_through_and_not_missed_where_they_are_not(one: Tiny, tmp_path: Path) -> None:
    assert HFSource(saved(one)).config.mtp_num_layers == 0
    folder = hub_folder(one, tmp_path / "hub")
    source = HFSource(folder)
    assert source.config.mtp_num_layers == 1
    stored = load_file(folder / "model.safetensors")
    assert {"model.layers.3.eh_proj.weight", "model.layers.3.mlp.gate.e_score_correction_bias"} < set(stored)
    layout = Layout.create(3, tp=2, ep=2)
    checkpoint = make_mcore(source, tmp_path / "mg", layout, Metadata(source.config, layout, 1)).base()
    (tmp_path / "hf").mkdir()
    write_hf(checkpoint, tmp_path / "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert set(written) == set(stored) and all(torch.equal(written[name], stored[name]) for name in stored)


def test_a_prediction_layer_of_which_tensors_are_missing_is_refused(tmp_path: Path) -> None:
    folder = hub_folder(DEEPSEEK_V3, tmp_path / "hub")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.enorm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.3\.enorm\.weight"):
        HFSource(folder)


def test_the_live_model_leaves_prediction_layers_out(tmp_path: Path) -> None:
    ids = tokens()
    arguments = {"folder": hub_folder(DEEPSEEK_V3, tmp_path / "hub"), "ids": ids.numpy()}
    ((_, found),) = pool(1).run("tests.models.moe_worker:logits", **arguments)
    assert torch.allclose(torch.from_numpy(found), reference(DEEPSEEK_V3, ids), atol=1e-5)


def test_an_expert_number_is_turned_into_the_global_one() -> None:
    local = "module." + FC1.format(1, 2)
    assert logical_name(local, first_layer=4, first_expert=8) == FC1.format(5, 10)
    assert expert_number(FC1.format(5, 10)) == 10
    assert expert_number("decoder.layers.3.mlp.router.weight") is None


def local_model(source: HFSource, share: ExpertShare, tp: int) -> dict[str, torch.Tensor]:
    """Zeros in the shapes of a rank's parameters (the last TP rank's), experts numbered from 0."""
    live = {}
    for name in source.names():
        number = expert_number(name)
        if number is None:
            live[name] = torch.zeros_like(local_slice(source.table, name, source.read(name), tp, tp - 1))
        elif share.first <= number < share.first + share.count:
            part = local_slice(source.table, name, source.read(name), share.parts, share.part)
            live[name.replace(f"local_experts.{number}.", f"local_experts.{number - share.first}.")] = torch.zeros_like(
                part
            )
    return live


@pytest.mark.parametrize("share", [ExpertShare(4, 4, 1, 2), ExpertShare(2, 2), ExpertShare(0, 8, 0, 2)])
def test_a_rank_gets_its_experts_and_its_part_of_each(share: ExpertShare) -> None:
    source = HFSource(saved(QWEN3_MOE))
    live = local_model(source, share, tp=2)
    load_live(live, source, tp_rank=1, tp_size=2, experts=share)
    whole = load_file(saved(QWEN3_MOE) / "model.safetensors")
    for local in (0, share.count - 1):
        hub = f"model.layers.2.mlp.experts.{share.first + local}."
        gate, up, down = (whole[f"{hub}{name}_proj.weight"] for name in ("gate", "up", "down"))
        part = [one.chunk(share.parts)[share.part] for one in (gate, up)]
        assert torch.equal(live[FC1.format(2, local)], torch.cat(part))
        assert torch.equal(live[FC2.format(2, local)], down.chunk(share.parts, 1)[share.part])


def test_an_expert_that_is_missing_or_of_a_wrong_cut_is_named() -> None:
    source = HFSource(saved(QWEN3_MOE))
    share = ExpertShare(4, 4)
    live = local_model(source, share, tp=1)
    del live[FC2.format(1, 0)]
    live[FC1.format(0, 3)] = torch.zeros(18, 40)
    with pytest.raises(InputError) as error:
        load_live(live, source, experts=share)
    assert f"{FC2.format(1, 4)} is not in the model" in str(error.value)
    assert f"{FC1.format(0, 7)}: the model has [18, 40], the checkpoint [36, 40] for ETP1" in str(error.value)


def test_live_tensors_are_parameters_and_persistent_buffers() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False))
    module[0].register_buffer("kept", torch.ones(1))
    module[0].register_buffer("scratch", torch.ones(1), persistent=False)
    assert list(live_tensors(module)) == ["0.weight", "0.kept"]


def test_a_config_without_the_key_has_one_prediction_layer_as_in_transformers() -> None:
    raw = json.loads((saved(DEEPSEEK_V3) / "config.json").read_text())
    raw.pop("num_nextn_predict_layers", None)
    raw.pop("num_mtp_layers", None)
    assert ModelConfig.from_hf_dict(raw, "here").mtp_num_layers == 1
    assert ModelConfig.from_hf_dict({**raw, "num_nextn_predict_layers": 0}, "here").mtp_num_layers == 0
