"""Every rank's own slices land in live parameters."""

from pathlib import Path

import pytest
import torch

from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.formats.mcore_names import chunk_entries
from mindspeed_llm.checkpoint.formats.torch_file import materialise, read_torch_file
from mindspeed_llm.checkpoint.layout import Layout, Rank
from mindspeed_llm.checkpoint.live import load_live
from mindspeed_llm.checkpoint.metadata import LoraSettings
from mindspeed_llm.checkpoint.open import open_lora
from mindspeed_llm.checkpoint.tables import file_key
from mindspeed_llm.errors import InputError
from tests.checkpoint.tiny import TARGETS, make_hf, make_mcore, random_adapter, write_adapter


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp", "chunk"), [(1, 1, None), (2, 2, None), (2, 2, 1)])
def test_live_parameters_equal_the_rank_files_of_a_conversion(
    tp: int, pp: int, chunk: int | None, tied: bool, tmp_path: Path
) -> None:
    source = HFSource(make_hf(tmp_path / "hf", tied))
    layout = Layout.even(4, tp, pp, chunk)
    make_mcore(source, tmp_path / "mg", layout)
    other = make_mcore(source, tmp_path / "other", Layout.even(4, 1, 4)).base()
    for tp_rank, pp_rank, _ in layout.ranks():
        file = tmp_path / "mg" / "iter_0000001" / layout.rank_folder(tp_rank, pp_rank) / "model_optim_rng.pt"
        content = materialise(read_torch_file(file))
        for vp_rank, key in enumerate(layout.model_keys()):
            expected = {name: value for name, value in content[key].items() if value is not None}
            for origin in (source, other):
                live = {f"module.{name}": torch.zeros_like(value) for name, value in expected.items()}
                first = layout.slots(pp_rank, vp_rank)[0]
                loaded = load_live(live, origin, tp_rank, tp, first)
                assert loaded.tensors == len(expected)
                assert all(torch.equal(live[f"module.{name}"], value) for name, value in expected.items())


def test_values_are_cast_to_the_type_of_the_parameter(tmp_path: Path) -> None:
    source = HFSource(make_hf(tmp_path / "hf"))
    live = {name: torch.zeros(source.shape(name), dtype=torch.float32) for name in source.names()}
    load_live(live, source)
    assert all(torch.equal(live[name], source.read(name).float()) for name in live)


def test_a_live_vocabulary_may_be_padded_further_than_the_file(tmp_path: Path) -> None:
    source = HFSource(make_hf(tmp_path / "hf"))
    name = "embedding.word_embeddings.weight"
    base = make_mcore(source, tmp_path / "mg", Layout.even(4, 2)).base()
    shares = [torch.zeros(64, 24) for _ in range(2)]
    for rank, share in enumerate(shares):
        load_live({name: share}, base, rank, 2)
    table = source.read(name).float()
    assert torch.equal(torch.cat(shares), torch.cat([table, table[-1:].expand(128 - 37, -1)]))


def test_lora_parameters_are_filled_from_an_adapter_at_another_layout(tmp_path: Path) -> None:
    source = HFSource(make_hf(tmp_path / "hf"))
    factors = random_adapter(source.table)
    settings = LoraSettings(3, 6, TARGETS)
    lora = open_lora(write_adapter(tmp_path / "lora", source.table, factors, Layout.even(4, 2, 2, 1), settings))
    prefix = "base_model.model.module."
    live = {prefix + file_key(name, 0): torch.zeros_like(value) for name, value in factors.items()}
    frozen = {prefix + name: torch.ones(source.shape(name)) for name in source.names()}
    load_live({**live, **frozen}, lora.tensors)
    assert all(torch.equal(live[prefix + file_key(name, 0)], value) for name, value in factors.items())
    assert all(bool((value == 1).all()) for value in frozen.values())
    fewer = {name: value for name, value in live.items() if "linear_fc2" not in name}
    with pytest.raises(InputError, match=r"linear_fc2.lora_A.weight is not in the model"):
        load_live(fewer, lora.tensors)
    with pytest.raises(InputError, match="the model has none of its tensors"):
        load_live(frozen, lora.tensors)


def test_everything_that_does_not_fit_is_listed_and_nothing_is_copied(tmp_path: Path) -> None:
    source = HFSource(make_hf(tmp_path / "hf"))
    live = {name: torch.zeros(source.shape(name)) for name in source.names()}
    del live["decoder.layers.2.mlp.linear_fc1.weight"]
    live["decoder.layers.1.mlp.linear_fc2.weight"] = torch.zeros(24, 45)
    live["decoder.layers.0.surprise.weight"] = torch.zeros(1)
    with pytest.raises(InputError) as error:
        load_live(live, source)
    message = str(error.value)
    assert "layers.2.mlp.linear_fc1.weight is not in the model" in message
    assert "the model has [24, 45], the checkpoint [24, 44]" in message
    assert "surprise.weight is not in the checkpoint" in message
    assert not any(value.any() for value in live.values())


def test_a_stage_wants_only_its_own_layers(tmp_path: Path) -> None:
    source = HFSource(make_hf(tmp_path / "hf"))
    layout = Layout.even(4, 1, 2)
    names = [name for name, _ in chunk_entries(source.table, layout, Rank(0, 1))]
    live = {file_key(name, 2): torch.zeros(source.shape(name)) for name in names}
    assert load_live(live, MegatronCheckpoint(make_mcore(source, tmp_path / "m", layout).folder).base(), first_layer=2)
    assert torch.equal(
        live["decoder.layers.0.mlp.linear_fc1.weight"], source.read("decoder.layers.2.mlp.linear_fc1.weight").float()
    )
