"""HF folders as they are found: caches of links, no index, and every kind of damage, told in one line with names."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats import blocks
from mindspeed_llm.checkpoint.formats.hf import HFSource, write_hf
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor
from mindspeed_llm.errors import InputError
from tests.checkpoint.tiny import make_hf

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


def sharded(folder: Path, **options: bool) -> Path:
    """A tiny model in several shards with an index."""
    source = HFSource(make_hf(folder, **options))
    write_hf(source, folder, shard_bytes=9000)
    (folder / "model.safetensors").unlink()
    return folder


def edit(folder: Path, change: Callable[[dict], object]) -> Path:
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def edit_index(folder: Path, change: Callable[[dict], object]) -> Path:
    """Rewrite the index after `change(weight_map)`."""
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def write_raw(path: Path, header: str, data: bytes = b"") -> None:
    """A safetensors file with any header."""
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refused(folder: Path, message: str, **options: bool) -> str:
    """The one line the folder is refused with."""
    with pytest.raises(InputError, match=message) as error:
        HFSource(folder, **options)
    text = str(error.value)
    assert "\n" not in text and str(folder) in text
    return text


def test_a_snapshot_of_links_into_a_cache_is_read(tmp_path: Path) -> None:
    """As the hub's cache lies: snapshots/<revision>/<name> -> ../../blobs/<hash>."""
    folder = sharded(tmp_path / "hf")
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        (blobs / f"{number:040x}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    assert content_hash(HFSource(snapshot)) == content_hash(HFSource(folder))
    shard = sorted(snapshot.glob("model-*"))[1]
    shard.resolve().unlink()
    refused(snapshot, rf"{shard.name}: a link to \.\./\.\./blobs/\w+, which does not exist; download it again")


def test_a_read_only_folder_is_read(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "hf")
    expected = content_hash(HFSource(folder))
    for path in folder.iterdir():
        path.chmod(0o440)
    folder.chmod(0o550)
    try:
        before = sorted(os.listdir(folder))
        assert content_hash(HFSource(folder)) == expected and sorted(os.listdir(folder)) == before
    finally:
        folder.chmod(0o750)


def test_shards_without_an_index_are_one_model_if_all_are_there_and_nothing_is_stored_twice(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "hf")
    expected = content_hash(HFSource(folder))
    (folder / INDEX).unlink()
    assert content_hash(HFSource(folder)) == expected
    save_file({"extra": torch.ones(1)}, folder / "adapter.safetensors")
    assert content_hash(HFSource(folder)) == expected
    first, second = sorted(folder.glob("model-*"))[:2]
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    refused(folder, rf"{second.name}: \S+ is stored twice, in {first.name} too")
    second.write_bytes(kept)
    sorted(folder.glob("model-*"))[-1].unlink()
    refused(folder, r"\d+ shards \(model-00001-of-\d+.safetensors ...\) of \d+; download the missing ones")


def test_a_single_file_of_any_name_is_read_and_several_are_not_guessed(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf")
    expected = content_hash(HFSource(folder))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert content_hash(HFSource(folder)) == expected
    save_file({"extra": torch.ones(1)}, folder / "other.safetensors")
    refused(folder, r"no weights.*other.safetensors, weights.safetensors are not told apart")
    (folder / "weights.safetensors").unlink()
    (folder / "other.safetensors").unlink()
    refused(folder, "no weights: neither model.safetensors.index.json nor model.safetensors nor pytorch_model.bin")


@pytest.mark.parametrize("shard", ["../model-00001-of-00002.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_that_points_outside_its_folder_is_refused(shard: str, tmp_path: Path) -> None:
    folder = edit_index(sharded(tmp_path / "hf"), lambda where: where.update({NORM: shard}))
    refused(folder, "lies outside the folder; refused")


def test_an_index_that_does_not_fit_its_shards_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "hf")
    good = (folder / INDEX).read_text()
    files = sorted({*json.loads(good)["weight_map"].values()})
    edit_index(folder, lambda where: where.update(surprise=files[0]))
    refused(folder, r"1 tensors of model.safetensors.index.json are in no shard: surprise")
    (folder / INDEX).write_text(good)
    edit_index(folder, lambda where: where.update({NORM: files[0]}))
    refused(folder, rf"says {NORM} is in {files[0]}, it is in {files[-1]} \(1 such")
    for text, message in (
        ("{", "JSONDecodeError"),
        ("{}", "KeyError"),
        ('{"weight_map": {}}', "lists no tensors"),
        ('{"weight_map": {"a": 1}}', "does not give a file name"),
        ("[]", "TypeError"),
    ):
        (folder / INDEX).write_text(text)
        refused(folder, f"broken index .*{message}")
    (folder / INDEX).write_text(good)
    (folder / files[1]).unlink()
    refused(folder, rf"{files[1]}: no such file, but {INDEX} lists it; download it again")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_shard_is_named(keep: float, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "hf")
    shard = sorted(folder.glob("model-*"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    refused(folder, rf"{shard.name}: .*truncated")


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    entry = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    cases = [
        (f'{{"a": {entry}, "a": {entry}}}', "a is stored twice"),
        (f'{{"a": {entry}, "b": {entry}}}', "b begins at byte .* inside a"),
        (f'{{"a": {entry.replace("[0, 8]", "[0, 4]")}}}', "needs 8 bytes, the header says 4"),
        (f'{{"a": {entry.replace("[2]", "[-2]")}}}', "broken header entry"),
        (f'{{"a": {entry.replace("F32", "Q3")}}}', "type Q3 is not supported"),
        (f'{{"a": {entry.replace("[0, 8]", "[-8, 0]")}}}', "broken header entry"),
        ('{"a": 3}', "broken header entry"),
        ("[1]", "not an object"),
        ("{nonsense", "broken safetensors header"),
    ]
    folder = make_hf(tmp_path / "hf")
    for header, message in cases:
        write_raw(folder / "model.safetensors", header, b"\0" * 8)
        refused(folder, message)


def test_missing_unknown_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    refused(edit(make_hf(tmp_path / "a"), lambda tensors: tensors.pop(NORM)), rf"1 tensors are missing \['{NORM}'\]")
    folder = edit(make_hf(tmp_path / "b"), lambda t: t.update({f"new{n}": torch.ones(1) for n in range(7)}))
    refused(folder, r"7 are unknown to a qwen3 model \['new0', .*'new4'\] and 2 more; --ignore-unknown leaves them out")
    folder = edit(make_hf(tmp_path / "c"), lambda tensors: tensors.update({NORM: torch.ones(3)}))
    refused(folder, rf"{NORM} has shape \[3\], config.json asks for \[24\]")


def test_unknown_tensors_are_left_out_on_request_counted_and_said(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf")
    expected = content_hash(HFSource(folder))
    assert HFSource(folder, ignore_unknown=True).notes == []
    edit(folder, lambda tensors: tensors.update(surprise=torch.ones(1), another=torch.ones(2)))
    source = HFSource(folder, ignore_unknown=True)
    assert content_hash(source) == expected
    assert source.notes == [f"{folder}: 2 unknown tensors are left out: ['another', 'surprise']"]
    edit(folder, lambda tensors: tensors.pop(NORM))
    refused(folder, "1 tensors are missing", ignore_unknown=True)


def test_tensors_that_make_up_one_weight_have_one_type(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    folder = edit(make_hf(tmp_path / "hf"), lambda tensors: tensors.update({name: tensors[name].half()}))
    text = refused(folder, f"{name} is torch.float16, .*q_proj.weight is torch.bfloat16; they make up")
    assert "decoder.layers.2.self_attention.linear_qkv.weight" in text
    edit(make_hf(tmp_path / "int"), lambda tensors: tensors.update({NORM: tensors[NORM].int()}))
    refused(tmp_path / "int", f"{NORM} is torch.int32, expected bfloat16, float16 or float32")


def test_a_stored_output_layer_of_a_tied_model_must_be_the_embedding(tmp_path: Path) -> None:
    def add(place: tuple[int, int] | None) -> Callable[[dict], None]:
        def change(tensors: dict) -> None:
            tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
            if place:
                tensors["lm_head.weight"][place] += 1

        return change

    assert HFSource(edit(make_hf(tmp_path / "same", tied=True), add(None))).notes == []
    for number, place in enumerate([(0, 0), (36, 23), (17, 5)]):
        refused(edit(make_hf(tmp_path / str(number), tied=True), add(place)), "holds other values .*tie_word_embed")


def test_tied_tensors_are_compared_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_hf(tmp_path / "hf", tied=True)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 200)
    largest: list[int] = []
    plain = LazyTensor.read
    monkeypatch.setattr(LazyTensor, "read", lambda *box: largest.append(plain(*box).nbytes) or plain(*box))
    HFSource(folder)
    assert max(largest) <= 200 and sum(largest) == 2 * 37 * 24 * 2


def test_frequencies_that_older_exports_carry_are_no_unknown_tensors(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    HFSource(edit(make_hf(tmp_path / "hf"), lambda tensors: tensors.update({name: torch.ones(5)})))
