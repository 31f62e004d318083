"""The algebra of parts: closed forms, and that parts and wholes are each other's inverse."""

import pytest
import torch

from mindspeed_llm.checkpoint.formats.lazy import InMemory, assemble, part_of
from mindspeed_llm.checkpoint.kinds import AxisMap, Segment, hf_map, padded_vocabulary, shard_map, vocabulary_map
from mindspeed_llm.checkpoint.live import local_slice
from mindspeed_llm.checkpoint.tables import WeightTable, file_key, logical_name
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families.base import Join, Kind
from tests.checkpoint.tiny import TARGETS, hf_config, join_slices, random_adapter

CONFIG = ModelConfig.from_hf_dict(hf_config(), "here")
TABLE = WeightTable(CONFIG)
QKV = "decoder.layers.1.self_attention.linear_qkv"
FC1 = "decoder.layers.1.mlp.linear_fc1"


def test_qkv_rows_lie_group_by_group() -> None:
    q, k, v = (torch.arange(rows * 24.0).view(rows, 24) + shift for rows, shift in ((60, 0), (20, 1e4), (20, 2e4)))
    parts = [InMemory(part) for part in (q, k, v)]
    found = assemble(parts, hf_map(Join.QKV, CONFIG, 100))
    grouped = torch.cat([q.view(2, 30, 24), k.view(2, 10, 24), v.view(2, 10, 24)], 1).reshape(100, 24)
    assert torch.equal(found, grouped)


def test_a_gated_share_is_a_block_of_gate_above_the_same_block_of_up() -> None:
    whole = torch.arange(88 * 24.0).view(88, 24)
    gate, up = whole.chunk(2)
    for rank in range(2):
        expected = torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
        assert torch.equal(local_slice(TABLE, f"{FC1}.weight", whole, 2, rank), expected)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", list(TABLE.entries))
def test_shares_join_to_the_whole_and_any_range_of_it_can_be_read(name: str, tp: int) -> None:
    shape = TABLE.shape(name)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    shares = [local_slice(TABLE, name, whole, tp, rank) for rank in range(tp)]
    assert torch.equal(join_slices(TABLE, name, shares), whole)
    axis = TABLE.shard_map(name, tp)
    for dim in range(len(shape)):
        size = shape[dim]
        ranges = [(size // 2, size), (1, size // 3), (0, 1)]
        expected = torch.cat([whole.narrow(dim, start, stop - start) for start, stop in ranges], dim)
        box = (ranges, None) if dim == 0 else (None, ranges)
        assert torch.equal(assemble([InMemory(share) for share in shares], axis, *box), expected)


@pytest.mark.parametrize("name", list(TABLE.entries))
def test_hf_tensors_cut_from_a_whole_join_to_it_again(name: str) -> None:
    entry = TABLE.entry(name)
    whole = torch.randn(entry.shape, generator=torch.Generator().manual_seed(2))
    parts = [part_of(InMemory(whole).read, entry.hf_map(), part) for part in range(len(entry.hf))]
    assert [tuple(part.shape) for part in parts] == [entry.hf_shape(part) for part in range(len(entry.hf))]
    assert torch.equal(assemble([InMemory(part) for part in parts], entry.hf_map()), whole)


@pytest.mark.parametrize("target", TARGETS)
def test_a_rank_share_of_b_times_a_is_the_share_of_the_product(target: str) -> None:
    factors = {k: v for k, v in random_adapter(TABLE).items() if "layers.1." in k and f".{target}." in k}
    (a_name, a), (b_name, b) = sorted(factors.items())
    name = a_name.replace(".lora_A", "")
    for rank in range(2):
        own = local_slice(TABLE, b_name, b, 2, rank) @ local_slice(TABLE, a_name, a, 2, rank)
        torch.testing.assert_close(own, local_slice(TABLE, name, b @ a, 2, rank))


@pytest.mark.parametrize(("tp", "divisible_by"), [(1, 1), (2, 1), (4, 1), (2, 8), (4, 16), (1, 128)])
def test_padding_repeats_the_last_row_up_to_the_multiple_and_is_cut_again(tp: int, divisible_by: int) -> None:
    rows = padded_vocabulary(37, tp, divisible_by)
    assert rows % (tp * divisible_by) == 0 and rows - 37 < tp * divisible_by
    table = torch.randn(37, 5)
    axis = vocabulary_map("embedding", 37, tp, rows)
    shares = [part_of(InMemory(table).read, axis, rank) for rank in range(tp)]
    expected = torch.cat([table, table[-1:].expand(rows - 37, -1)]).chunk(tp)
    assert all(torch.equal(share, wanted) for share, wanted in zip(shares, expected, strict=True))
    assert torch.equal(assemble([InMemory(share) for share in shares], axis), table)


def test_touching_segments_are_read_at_once() -> None:
    axis = AxisMap(0, (Segment(0, 0, 4), Segment(0, 4, 4), Segment(1, 0, 4)), (0, 0))
    assert axis.locate() == [(0, 0, 8), (1, 0, 4)]
    assert axis.part_ranges(0) == [(0, 8)]


@pytest.mark.parametrize(
    ("kind", "shape", "tp"), [(Kind.QKV, (100, 24), 4), (Kind.ROW, (24, 44), 8), (Kind.GATED, (88, 24), 3)]
)
def test_sizes_that_do_not_divide_are_refused_naming_both(kind: Kind, shape: tuple[int, int], tp: int) -> None:
    with pytest.raises(UsageError, match=f"not divisible by tensor parallel size {tp}"):
        shard_map("linear", kind, CONFIG, shape, tp)


def test_local_names_become_logical_ones_whatever_wraps_them() -> None:
    expected = f"{QKV.replace('layers.1', 'layers.5')}.lora_A.weight"
    local = "module.base_model.model.module.decoder.layers.1.self_attention.linear_qkv.lora_A.default.weight"
    assert logical_name(local, first_layer=4) == expected
    assert logical_name(f"{QKV}.base_layer.weight") == f"{QKV}.weight"
    assert file_key(expected, 4) == "decoder.layers.1.self_attention.linear_qkv.lora_A.default.weight"
    assert file_key(f"{QKV}.weight", 0, wrapped=True) == f"{QKV}.base_layer.weight"


def test_a_tensor_the_model_does_not_have_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no such tensor"):
        TABLE.shape("decoder.layers.99.mlp.linear_fc1.weight")
