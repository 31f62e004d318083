"""torch_dist checkpoints: what megatron-core saves is read, and what is written megatron-core loads."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, narrow
from mindspeed_llm.checkpoint.formats.mcore_names import EXPERT_NUMBER
from mindspeed_llm.checkpoint.formats.torch_dist import TorchDistSource, is_torch_dist
from mindspeed_llm.checkpoint.formats.torch_dist_file import Chunk, ChunkedTensor
from mindspeed_llm.checkpoint.formats.torch_dist_names import form_of
from mindspeed_llm.checkpoint.formats.torch_dist_writer import write_torch_dist
from mindspeed_llm.checkpoint.kinds import Ranges
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.live import local_slice
from mindspeed_llm.checkpoint.metadata import Metadata, write_metadata
from mindspeed_llm.checkpoint.tables import EMBEDDING, OUTPUT_LAYER, WeightTable, logical_name
from mindspeed_llm.checkpoint.upstream_args import upstream_args
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.models.config import ModelConfig
from tests.checkpoint.tiny import hf_config
from tests.distributed.pool import pool
from tests.models.tiny_moe import ATTENTION, COMMON, LATENT, QWEN_MOE, SIGMOID_MOE

SINGLETONS = {"singleton_local_shards": True}
PER_LAYER = {"non_homogeneous_layers": True}
PREDICTING = {"use_qk_norm": True, "attention_bias": False, "num_nextn_predict_layers": 1}
RAW = {
    "dense": hf_config(dtype="float32"),
    "tied": hf_config(tied=True, dtype="float32"),
    "experts": {"architectures": ["Qwen3MoeForCausalLM"], **COMMON, **ATTENTION, **QWEN_MOE},
    "mixed": {"architectures": ["Glm4MoeForCausalLM"], **COMMON, **ATTENTION, **SIGMOID_MOE, **PREDICTING},
    "latent": {"architectures": ["DeepseekV3ForCausalLM"], **COMMON, **LATENT, **SIGMOID_MOE, "q_lora_rank": 16},
}
OWN_TABLES = ("mtp.layers.0.embed_tokens.weight", "mtp.layers.0.output_layer.weight")
"""Hub tensors megatron-core has no place for: its prediction layers share the network's."""


DIFFERING = ("mixed", "latent")
"""Models whose first layer has no experts."""


@cache
def model(name: str) -> ModelConfig:
    """One of the tiny models, in float32."""
    raw = {"num_nextn_predict_layers": 0, **RAW[name], "torch_dtype": "float32"}
    return ModelConfig.from_hf_dict(raw, "here")


@dataclass
class Drawn:
    """Random weights by logical name (`TensorSource`)."""

    config: ModelConfig

    def __post_init__(self) -> None:
        self.table = WeightTable(self.config)
        generator = torch.Generator().manual_seed(3)
        dtype = getattr(torch, self.config.dtype)
        self.tensors = {
            name: torch.randn(entry.shape, generator=generator).to(dtype) for name, entry in self.table.entries.items()
        }

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> torch.Tensor:
        return narrow(self.tensors[self.table.resolve(name)], rows, columns)


def saved_by_megatron(folder: Path, name: str, size: int = 1, **options: Any) -> list[Any]:
    """A checkpoint of megatron-core's own making; -> what each rank held."""
    folder.mkdir()
    return pool(size).run("tests.checkpoint.dist_worker:save", model=model(name), folder=folder, **options)


def loaded_by_megatron(folder: Path, name: str, size: int = 1, **options: Any) -> list[Any]:
    """What each rank of megatron-core's own model holds after loading, keys missing, common part."""
    return pool(size).run("tests.checkpoint.dist_worker:load", model=model(name), folder=folder, **options)


def written(folder: Path, source: Any, **options: Any) -> Path:
    """A checkpoint of ours."""
    folder.mkdir(parents=True)
    write_torch_dist(source, folder, **options)
    return folder


def check_source(source: TorchDistSource, expected: Callable[[str], torch.Tensor]) -> None:
    """Every tensor of the table is there, whole and in boxes, bit for bit."""
    assert source.names() == list(source.table.entries)
    for name in source.names():
        whole = expected(name)
        assert source.dtype(name) == whole.dtype and torch.equal(source.read(name), whole), name
        rows = whole.shape[0]
        box = [(rows // 2, rows), (1, 3)]
        columns = [(2, 5), (0, 1)] if whole.dim() > 1 and whole.shape[1] > 5 else None
        assert torch.equal(source.read(name, box, columns), narrow(whole, box, columns).contiguous()), name


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
            name = EXPERT_NUMBER.sub(
                lambda match, rank=rank: str(int(match[0]) + rank.first_expert),
                logical_name(local_name, rank.first_layer),
            )
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
    assert is_torch_dist(tmp_path / "run" / "iter_0000007") and not is_torch_dist(tmp_path / "run")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    assert is_torch_dist(tmp_path / "run")
    assert TorchDistSource(tmp_path / "run").path == tmp_path / "run" / "iter_0000007"


def damaged(folder: Path, change: Callable[[Any], object]) -> Path:
    """Rewrite the index after `change(index)`."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def refused(folder: Path, message: str, **options: Any) -> None:
    """One line of error."""
    with pytest.raises(InputError, match=message) as error:
        TorchDistSource(folder, model("dense"), **options)
    assert "\n" not in str(error.value)


def rename(index: Any, old: str, new: str) -> None:
    """Give a key of the index another name."""
    index.state_dict_metadata[new] = index.state_dict_metadata.pop(old)
    for place in [place for place in index.storage_data if place.fqn == old]:
        index.storage_data[type(place)(new, place.offset, place.index)] = index.storage_data.pop(place)


NORM = "decoder.final_layernorm.weight"


def each_chunk(field: str, value: Any) -> Callable[[Any], None]:
    """A change of one field of every storage record."""
    return lambda index: [setattr(info, field, value) for info in index.storage_data.values()]


DAMAGE = [
    (lambda index: rename(index, NORM, "surprise"), rf"1 tensors are missing \['{NORM}'\]; 1 are unknown .*surprise"),
    (lambda index: index.state_dict_metadata[NORM].chunks.clear(), f"chunks of {NORM} hold 0 of 24 values"),
    (each_chunk("relative_path", "../elsewhere"), r"file '../elsewhere' of .* lies outside the folder; refused"),
    (each_chunk("relative_path", "gone.distcp"), "gone.distcp: no such file, but .metadata lists it"),
    (each_chunk("length", 1 << 40), "truncated"),
    (each_chunk("transform_descriptors", ["zstd"]), "stored compressed"),
    (lambda index: index.storage_data.clear(), "is no checkpoint index"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_a_damaged_index_is_one_line_of_error(change: Callable, message: str, tmp_path: Path) -> None:
    refused(damaged(written(tmp_path / "ckpt", Drawn(model("dense"))), change), message)


def test_other_damage_is_one_line_of_error(tmp_path: Path) -> None:
    folder = written(tmp_path / "ckpt", Drawn(model("dense")))
    whole = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(whole[: len(whole) // 2])
    refused(folder, "broken pickle")
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    refused(folder, "a dict, expected Metadata")
    (folder / ".metadata").unlink()
    refused(folder, "cannot be read .*the checkpoint is incomplete")
    (folder / ".metadata").write_bytes(whole)
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert is_torch_dist(folder)
    refused(folder, "'zarr' cannot be read; save it with torch_dist")
    (folder / "metadata.json").write_text("{}")
    refused(folder, "does not name its backend")
    with pytest.raises(InputError, match=r"input_layernorm.weight has shape \[4, 24\], its settings ask for \[3, 24\]"):
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        TorchDistSource(folder, ModelConfig.from_hf_dict(hf_config(layers=3), "here"))


def test_a_shard_that_is_not_what_the_index_says_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "ckpt", Drawn(model("dense")))
    first, second = (f"decoder.layers.mlp.{part}.weight" for part in ("linear_fc1", "linear_fc2"))

    def swap(index: Any) -> None:
        places = {place.fqn: place for place in index.storage_data if place.offset == (1, 0, 0)}
        for field in ("offset", "length"):
            one, other = (index.storage_data[places[key]] for key in (first, second))
            kept = getattr(one, field)
            setattr(one, field, getattr(other, field))
            setattr(other, field, kept)

    source = TorchDistSource(damaged(folder, swap), model("dense"))
    with pytest.raises(InputError, match=r"lies \[1, 24, 44\], .metadata says \[1, 88, 24\]"):
        source.read("decoder.layers.1.mlp.linear_fc1.weight")
    shard = folder / "__0_0.distcp"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(InputError, match="not a complete torch file"):
        source.read(NORM)


def test_unknown_tensors_are_left_out_on_request_and_said(tmp_path: Path) -> None:
    source = Drawn(model("dense"))
    folder = damaged(written(tmp_path / "ckpt", source), lambda index: rename(index, NORM, "surprise"))
    refused(folder, "1 tensors are missing", ignore_unknown=True)
    again = written(tmp_path / "again", source)

    def add(index: Any) -> None:
        index.state_dict_metadata["surprise"] = index.state_dict_metadata[NORM]
        (info,) = [info for place, info in index.storage_data.items() if place.fqn == NORM]
        index.storage_data[type(next(iter(index.storage_data)))("surprise", (0,), 0)] = info

    damaged(again, add)
    refused(again, "1 are unknown to a qwen3 model .*surprise")
    found = TorchDistSource(again, model("dense"), ignore_unknown=True)
    check_source(found, source.read)
    assert found.notes == [f"{again}: 1 unknown tensors are left out: ['surprise']"]


class Bomb:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (open, (str(self.trace), "w"))


def test_code_in_an_index_is_never_run(tmp_path: Path) -> None:
    folder = written(tmp_path / "ckpt", Drawn(model("dense")))
    damaged(folder, lambda index: setattr(index, "planner_data", Bomb(tmp_path / "ran")))
    (tmp_path / "ran").unlink(missing_ok=True)
    TorchDistSource(folder, model("dense"))
    assert not (tmp_path / "ran").exists()


def test_reading_and_writing_import_no_megatron_core(tmp_path: Path) -> None:
    folder = written(tmp_path / "ckpt", Drawn(model("dense")))
    (tmp_path / "out").mkdir()
    code = (
        "import sys; from pathlib import Path;"
        "from mindspeed_llm.checkpoint.formats.torch_dist import TorchDistSource;"
        "from mindspeed_llm.checkpoint.formats.torch_dist_writer import write_torch_dist;"
        f"write_torch_dist(TorchDistSource({str(folder)!r}), Path({str(tmp_path / 'out')!r}));"
        "print([name for name in sys.modules if name.startswith('megatron')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert json.loads((tmp_path / "out" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
