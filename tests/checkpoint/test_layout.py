"""Which stage holds which layer."""

import json

import pytest

from mindspeed_llm.checkpoint.formats.mcore_names import chunk_entries
from mindspeed_llm.checkpoint.layout import Layout, Rank
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.errors import UsageError
from mindspeed_llm.models.config import ModelConfig
from tests.checkpoint.tiny import hf_config


def test_virtual_stages_deal_out_layers_round_robin() -> None:
    layout = Layout.even(8, pp=2, layers_per_virtual_stage=2)
    assert [list(layout.slots(pp, vp)) for vp in (0, 1) for pp in (0, 1)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.model_keys() == ["model0", "model1"]
    assert layout.layers_per_virtual_stage == 2 and layout.vp == 2


def test_rank_folders_carry_the_stage_only_when_there_are_several() -> None:
    assert Layout.even(4, tp=2).rank_folder(1, 0) == "mp_rank_01"
    assert Layout.even(4, tp=2, pp=2).rank_folder(1, 1) == "mp_rank_01_001"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("pp", "per_virtual_stage"), [(1, None), (2, None), (4, None), (2, 1)])
def test_every_tensor_lies_in_one_chunk_and_a_tied_embedding_also_on_a_last_stage(
    tied: bool, pp: int, per_virtual_stage: int | None
) -> None:
    table = WeightTable(ModelConfig.from_hf_dict(hf_config(tied), "here"))
    layout = Layout.even(4, 1, pp, per_virtual_stage)
    found = [
        name
        for vp in range(layout.vp)
        for rank in range(pp)
        for name, _ in chunk_entries(table, layout, Rank(0, rank), vp)
    ]
    extra = ["output_layer.weight"] if tied and pp > 1 else []
    assert sorted(found) == sorted([*table.entries, *extra])
    last = dict(chunk_entries(table, layout, Rank(0, pp - 1), layout.vp - 1))
    assert ("output_layer.weight" in last) == (not tied or pp > 1)


@pytest.mark.parametrize(("layers", "pp", "chunk"), [(4, 3, None), (4, 2, 3), (4, 1, 2), (4, 0, None), (6, 2, 2)])
def test_layers_that_do_not_divide_are_refused(layers: int, pp: int, chunk: int | None) -> None:
    with pytest.raises(UsageError):
        Layout.even(layers, 1, pp, chunk)


def test_a_layout_survives_its_dict() -> None:
    layout = Layout.create(8, 2, 2, 3, noop_layers=[0, 1, 10, 11], ep=4, etp=1)
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    assert layout.slots(0, 0) == (None, None, 0) and layout.slots(1, 1) == (7, None, None)
    assert layout.noop_layers == [0, 1, 10, 11]
