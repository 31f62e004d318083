"""torch_dist checkpoints: what megatron-core saves is read, and what is written megatron-core loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, narrow
from mindspeed_llm.checkpoint.formats.mcore_names import EXPERT_NUMBER
from mindspeed_llm.checkpoint.formats.torch_dist import TorchDistSource, is_torch_dist
from mindspeed_llm.checkpoint.formats.torch_dist_file import Chunk, ChunkedTensor
from mindspeed_llm.checkpoint.formats.torch_dist_names import form_of
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.live import local_slice
from mindspeed_llm.checkpoint.metadata import Metadata, write_metadata
from mindspeed_llm.checkpoint.tables import EMBEDDING, OUTPUT_LAYER, WeightTable, logical_name
from mindspeed_llm.checkpoint.upstream_args import upstream_args
from mindspeed_llm.errors import InputError, UsageError
from tests.checkpoint.dist_models import (
    DIFFERING,
    OWN_TABLES,
    PER_LAYER,
    RAW,
    SINGLETONS,
    Drawn,
    check_source,
    model,
    written,
)
from tests.distributed.pool import pool


def saved_by_megatron(folder: Path, name: str, size: int = 1, **options: Any) -> list[Any]:
    """A checkpoint of megatron-core's own making; -> what each rank held."""
    folder.mkdir()
    return pool(size).run("tests.checkpoint.dist_worker:save", model=model(name), folder=folder, **options)


def loaded_by_megatron(folder: Path, name: str, size: int = 1, **options: Any) -> list[Any]:
    """What each rank of megatron-core's own model holds after loading, keys missing, common part."""
    return pool(size).run("tests.checkpoint.dist_worker:load", model=model(name), folder=folder, **options)


CASES = [
    ("dense", None),
    ("tied", PER_LAYER),
    ("dense", SINGLETONS),
    ("experts", None),
    ("experts", SINGLETONS),
    ("mixed", None),
    ("mixed", SINGLETONS),
    ("latent", None),
    ("latent", SINGLETONS),
]


@pytest.mark.parametrize(("name", "metadata"), CASES)
def test_what_megatron_core_saves_is_read_under_logical_names(name: str, metadata: dict | None, tmp_path: Path) -> None:
    (held,) = saved_by_megatron(tmp_path / "ckpt", name, metadata=metadata)

    def expected(logical: str) -> torch.Tensor:
        shared = {OWN_TABLES[0]: EMBEDDING, OWN_TABLES[1]: OUTPUT_LAYER}
        return torch.from_numpy(held.tensors[shared.get(logical, logical)])

    check_source(TorchDistSource(tmp_path / "ckpt", model(name)), expected)


def test_a_checkpoint_saved_by_four_ranks_is_read_whole(tmp_path: Path) -> None:
    """TP2 PP2; the vocabulary of 37 is padded to 38 there."""
    held = saved_by_megatron(tmp_path / "ckpt", "dense", 4, tp=2, pp=2)
    source = TorchDistSource(tmp_path / "ckpt", model("dense"))
    check_ranks(held, source.read, source.table, 2)
    check_source(source, source.read)


def test_experts_saved_by_two_expert_parallel_ranks_are_read_whole(tmp_path: Path) -> None:
    held = saved_by_megatron(tmp_path / "ckpt", "experts", 2, ep=2)
    source = TorchDistSource(tmp_path / "ckpt", model("experts"))
    check_ranks(held, source.read, source.table, 1)


def check_ranks(held: list[Any], read: Callable[[str], torch.Tensor], table: WeightTable, tp: int) -> None:
    """Every rank holds its share of what `read` gives, and all together hold all of it."""
    seen = set()
    for rank in held:
        for local_name, values in rank.tensors.items():
            first = rank.expert_place[0]
            name = logical_name(local_name, rank.first_layer)
            name = EXPERT_NUMBER.sub(lambda match, first=first: str(int(match[0]) + first), name)
            seen.add(table.resolve(name))
            whole = read(table.resolve(name))
            if name in (EMBEDDING, OUTPUT_LAYER):  # what the padding rows hold is nobody's concern
                share = whole[rank.tp_rank * len(values) :][: len(values)]
            elif "_down_proj" in name:  # megatron-core cuts what upstream's converters keep whole
                share = whole.chunk(tp)[rank.tp_rank]
            elif EXPERT_NUMBER.search(name):
                share = local_slice(table, name, whole, rank.expert_place[3], rank.expert_place[2])
            else:
                share = local_slice(table, name, whole, tp, rank.tp_rank)
            assert torch.equal(torch.from_numpy(values[: len(share)]), share), name
    assert seen == {name for name in table.entries if name not in OWN_TABLES}


LOADS = [
    ("dense", 1, {}, None),
    ("dense", 4, {"tp": 2, "pp": 2}, None),
    ("tied", 4, {"tp": 2, "pp": 2}, False),
    ("experts", 1, {}, None),
    ("experts", 2, {"ep": 2}, None),
    ("experts", 1, {}, False),
    ("mixed", 1, {}, None),
    ("mixed", 2, {"ep": 2}, None),
    ("latent", 1, {}, None),
    ("latent", 4, {"tp": 2, "ep": 2}, None),
]


@pytest.mark.parametrize(("name", "size", "layout", "stacked"), LOADS)
def test_megatron_core_loads_what_is_written_at_any_layout(
    name: str, size: int, layout: dict, stacked: bool | None, tmp_path: Path
) -> None:
    source = Drawn(model(name))
    folder = written(tmp_path / "ckpt", source, stacked=stacked, iteration=7)
    metadata = PER_LAYER if stacked is False else None
    answers = loaded_by_megatron(folder, name, size, metadata=metadata, **layout)
    assert [lacking for _, lacking, _ in answers] == [[]] * size
    check_ranks([held for held, _, _ in answers], source.read, source.table, layout.get("tp", 1))
    common = answers[0][2]
    assert common["iteration"] == 7 and common["args"].hidden_size == model(name).hidden_size
    assert common["content_metadata"]["non_homogeneous_layers"] == (stacked is False or name in DIFFERING)


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("stacked", [None, False])
@pytest.mark.parametrize("file_bytes", [1, 9000, 1 << 40])
def test_what_is_written_is_read_back_bit_equal(
    name: str, stacked: bool | None, file_bytes: int, tmp_path: Path
) -> None:
    source = Drawn(model(name))
    written_bytes: list[int] = []
    folder = written(tmp_path / "ckpt", source, stacked=stacked, file_bytes=file_bytes, progress=written_bytes.append)
    write_metadata(folder, Metadata(source.config, Layout.even(source.config.num_layers)))
    found = TorchDistSource(folder)
    assert found.config == source.config and found.notes == []
    check_source(found, source.read)
    assert sum(written_bytes) == sum(tensor.nbytes for tensor in source.tensors.values())
    files = len(list(folder.glob("*.distcp")))
    assert files > 1 if file_bytes < 1 << 40 else files == 1
    assert {path.name for path in folder.iterdir() if path.suffix != ".distcp"} == {
        ".metadata", "common.pt", "metadata.json", "args.json"
    }  # fmt: skip


def test_types_are_kept_tensor_by_tensor(tmp_path: Path) -> None:
    source = Drawn(model("latent"))
    for name in source.tensors:
        if not name.endswith("expert_bias"):
            source.tensors[name] = source.tensors[name].to(torch.bfloat16)
    found = TorchDistSource(written(tmp_path / "ckpt", source), model("latent"))
    assert found.config.dtype == "bfloat16"
    check_source(found, source.read)
    assert {found.dtype(name) for name in found.names()} == {torch.bfloat16, torch.float32}


def test_layers_share_tensors_only_where_they_are_alike(tmp_path: Path) -> None:
    assert form_of(WeightTable(model("experts"))).stacked and not any(
        form_of(WeightTable(model(name))).stacked for name in DIFFERING
    )
    with pytest.raises(UsageError, match="the layers of this deepseek_v3 model differ"):
        written(tmp_path / "ckpt", Drawn(model("latent")), stacked=True)
    assert not list((tmp_path / "ckpt").iterdir())


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """Everything goes in blocks: no read of the source exceeds one."""
    from unittest import mock

    from mindspeed_llm.checkpoint.formats import blocks

    source = Drawn(model("dense"))
    sizes: list[int] = []
    plain = source.read
    source.read = lambda *box: sizes.append(plain(*box).nbytes) or plain(*box)
    with mock.patch.object(blocks, "BLOCK_BYTES", 500):
        folder = written(tmp_path / "ckpt", source)
    assert max(sizes) <= 500
    check_source(TorchDistSource(folder, model("dense")), plain)


def test_a_box_touches_only_the_chunks_it_lies_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_by_megatron(tmp_path / "ckpt", "dense", 4, tp=2, pp=2)
    source = TorchDistSource(tmp_path / "ckpt", model("dense"))
    read: list[tuple] = []
    plain = LazyTensor.read
    monkeypatch.setattr(LazyTensor, "read", lambda self, *box: read.append(box) or plain(self, *box))
    source.read("decoder.layers.2.mlp.linear_fc2.weight", [(3, 5)], [(20, 24)])
    assert read == [([(3, 5)], [(20, 22)]), ([(3, 5)], [(0, 2)])]


def test_a_tensor_of_uneven_chunks_is_put_together(tmp_path: Path) -> None:
    """Also where the box has very many ranges."""
    whole = torch.randn(2, 211, 40)
    chunks = []
    for number, (rows, columns) in enumerate([((0, 50), (0, 40)), ((50, 211), (0, 7)), ((50, 211), (7, 40))]):
        path = tmp_path / f"{number}.distcp"
        part = whole[:, slice(*rows), slice(*columns)].contiguous()
        with path.open("wb") as file:
            file.write(b"x" * (100 + number))
            torch.save(part, file)
        start = 100 + number
        place = (0, rows[0], columns[0])
        chunks.append(Chunk(place, tuple(part.shape), path, start, path.stat().st_size - start))
    tensor = ChunkedTensor((211, 40), torch.float32, (1,), tuple(chunks))
    assert torch.equal(tensor.read(), whole[1])
    many = [(row, row + 1) for row in range(0, 211, 2)]
    assert torch.equal(tensor.read(many, [(5, 9), (0, 2)]), narrow(whole[1], many, [(5, 9), (0, 2)]))
    assert tensor.read([(3, 3)]).shape == (0, 40)
    with pytest.raises(IndexError):
        tensor.read([(0, 212)])


def test_optimizer_state_is_left_out_and_said(tmp_path: Path) -> None:
    (held,) = saved_by_megatron(tmp_path / "ckpt", "dense", optimizer=True)
    source = TorchDistSource(tmp_path / "ckpt", model("dense"))
    check_source(source, lambda name: torch.from_numpy(held.tensors[name]))
    assert source.notes == [
        f"{tmp_path / 'ckpt'}: 1 tensors of optimizer state and 1 other states (rng_state) are left out; weights only"
    ]


def test_the_model_is_found_in_the_args_of_common_pt(tmp_path: Path) -> None:
    args = upstream_args(model("dense"), Layout.even(4), 37, 5)
    saved_by_megatron(tmp_path / "ckpt", "dense", common={"args": args, "iteration": 5})
    assert TorchDistSource(tmp_path / "ckpt").config == model("dense")
    args.model_type_hf = None
    saved_by_megatron(tmp_path / "plain", "dense", common={"args": args})
    assert TorchDistSource(tmp_path / "plain", family_name="qwen3").config == model("dense")
    with pytest.raises(InputError, match=r"plain/common.pt: its args do not say .*--model-type-hf"):
        TorchDistSource(tmp_path / "plain")


def test_a_run_folder_leads_to_its_checkpoint(tmp_path: Path) -> None:
    written(tmp_path / "run" / "iter_0000007", Drawn(model("dense")))
    assert is_torch_dist(tmp_path / "run" / "iter_0000007") and is_torch_dist(tmp_path / "run")
    assert not is_torch_dist(tmp_path)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    assert is_torch_dist(tmp_path / "run")
    assert TorchDistSource(tmp_path / "run").path == tmp_path / "run" / "iter_0000007"
