"""Damaged and mistaken input: one line that names file and remedy, nothing written, the source untouched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.checkpoint.convert import main
from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource
from tests.checkpoint.damage import (
    ARGS,
    INDEX,
    OTHER,
    RANK,
    SHARD,
    Damage,
    copy,
    edit_json,
    edit_rank,
    edit_tensors,
    one,
    refused,
    sources,
    without_args_json,
)

__all__ = ["sources"]

Q, K = (f"model.layers.1.self_attn.{one}_proj.weight" for one in "qk")
FC1 = "decoder.layers.1.mlp.linear_fc1.weight"


BINARY = {
    "hf": ("model.safetensors", "truncated"),
    "sharded": ("model-00002-*", "truncated"),
    "bin": ("pytorch_model.bin", "not a (zip archive|complete torch zip file).*truncated"),
    "torch": (RANK, "not a complete torch zip file .*truncated"),
    "dist": (SHARD, "truncated"),
}


@pytest.mark.parametrize("keep", [0, 1, 8, 100, 0.5, 0.99, -1])
@pytest.mark.parametrize("name", BINARY)
def test_a_truncated_file_is_named_wherever_it_ends(name: str, keep: float, sources: dict, tmp_path: Path) -> None:
    pattern, message = BINARY[name]

    def cut(folder: Path) -> None:
        path = one(folder, pattern)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep) if 0 < keep < 1 else int(keep)])

    folder = copy(sources, name, tmp_path, cut)
    assert str(one(folder, pattern)) in refused(folder, message)


SMALL = {
    "config.json": ("hf", "not valid JSON"),
    INDEX: ("sharded", "broken index"),
    ARGS: ("torch", "not valid JSON"),
    "latest_checkpointed_iteration.txt": ("torch", "expected an iteration number or release"),
    "iter_0000001/.metadata": ("dist", "broken pickle"),
    "iter_0000001/common.pt": ("dist", "not a complete torch zip file"),
    "iter_0000001/metadata.json": ("dist", "does not name its backend"),
}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00garbage"])
@pytest.mark.parametrize("path", SMALL)
def test_a_file_of_nonsense_is_named(path: str, content: bytes, sources: dict, tmp_path: Path) -> None:
    name, message = SMALL[path]
    folder = copy(sources, name, tmp_path, lambda folder: (folder / path).write_bytes(content))
    assert str(folder / path) in refused(folder, message)


@pytest.mark.parametrize("put", ["folder", "loop", "dangling"])
@pytest.mark.parametrize("path", [*SMALL, "model.safetensors", "pytorch_model.bin", RANK, SHARD])
def test_a_folder_or_a_broken_link_in_the_place_of_a_file_is_named(
    path: str, put: str, sources: dict, tmp_path: Path
) -> None:
    name = SMALL[path][0] if path in SMALL else {RANK: "torch", SHARD: "dist"}.get(path, "hf")
    name = "bin" if path.endswith(".bin") else name

    def replace(folder: Path) -> None:
        (folder / path).unlink()
        if put == "folder":
            (folder / path).mkdir()
        else:
            (folder / path).symlink_to((folder / path).name if put == "loop" else "gone")

    folder = copy(sources, name, tmp_path, replace)
    assert str(folder / path) in refused(folder, "no such file|is a folder|a link to|cannot be read")


MISSING = [
    ("hf", "model.safetensors", "no weights: neither model.safetensors.index.json nor"),
    ("hf", "config.json", r"config.json: no such file; a Hugging Face model folder holds a config.json"),
    ("sharded", "model-00002-*", "no such file, but model.safetensors.index.json lists it; download it again"),
    ("torch", RANK, "model_optim_rng.pt: no such file"),
    ("dist", SHARD, "no such file, but .metadata lists it; the checkpoint is incomplete"),
    ("dist", "iter_0000001/.metadata", "cannot be read .*the checkpoint is incomplete"),
    ("dist", "iter_0000001/metadata.json", "no finished torch_dist checkpoint"),
    ("dist", "iter_0000001/common.pt", "common.pt: no such file"),
]


@pytest.mark.parametrize(("name", "pattern", "message"), MISSING)
def test_a_missing_file_is_named(name: str, pattern: str, message: str, sources: dict, tmp_path: Path) -> None:
    refused(copy(sources, name, tmp_path, lambda folder: one(folder, pattern).unlink()), message)


def swap_name(folder: Path) -> None:
    """The index says a tensor is in a file of another folder."""
    edit_json(INDEX, lambda index: index["weight_map"].update({Q: "../other.safetensors"}))(folder)


def second_copy(folder: Path) -> None:
    """Two shards hold the same tensor."""
    first, second = sorted(folder.glob("model-*"))[:2]
    save_file({**load_file(first), **load_file(second)}, second)


def two_names(content: dict) -> None:
    """One tensor under two spellings."""
    content["model"][f"module.{FC1}"] = content["model"][FC1]


def fc1(change: Callable[[torch.Tensor], torch.Tensor], name: str = RANK) -> Damage:
    """Change one tensor of one rank file."""
    return edit_rank(lambda content: content["model"].update({FC1: change(content["model"][FC1])}), name)


def tensors(**values: Callable[[dict], torch.Tensor]) -> Damage:
    """Change or add tensors of model.safetensors, by the short names q, k or new."""
    names = {"q": Q, "k": K, "new": "new"}
    return edit_tensors(lambda held: held.update({names[name]: make(held) for name, make in values.items()}))


TENSORS = [
    ("sharded", swap_name, rf"{INDEX}: shard '../other.safetensors' lies outside the folder; refused"),
    ("sharded", second_copy, r"model-00002-of-\d+.safetensors: \S+ is stored twice, in model-00001-of-\d+.saf"),
    ("hf", tensors(q=lambda held: held[Q][:-1].clone()), rf"{Q} has shape \[59, 24\].* asks for \[60, 24\]"),
    ("hf", tensors(k=lambda held: held[K].float()), rf"{K} is torch.float32, {Q} is torch.bfloat16; they make up"),
    ("hf", tensors(k=lambda held: held[K].int()), rf"{K} is torch.int32"),
    ("hf", edit_tensors(lambda held: held.pop(Q)), rf"1 tensors are missing \['{Q}'\]"),
    ("hf", tensors(new=lambda _: torch.ones(1)), r"1 are unknown .*\['new'\]; --ignore-unknown leaves them out"),
    ("torch", edit_rank(lambda c: c["model"].pop(FC1).sum() and None), f"{FC1} is not on rank 0"),
    ("torch", fc1(lambda held: held[1:].clone()), rf"{FC1} has shape \[43, 24\], TP2 PP2 asks for \[44, 24\]"),
    (
        "torch",
        fc1(torch.Tensor.float),
        rf"mp_rank_01_000.*{FC1} is torch.bfloat16, expected torch.float32 as on rank 0",
    ),
    ("torch", fc1(torch.Tensor.float, OTHER), rf"mp_rank_01_000.*{FC1} is torch.float32, expected torch.bfloat16"),
    ("torch", fc1(torch.Tensor.int), rf"mp_rank_00_000.*{FC1} is torch.int32, expected bfloat16, float16 or float32"),
    ("torch", edit_rank(two_names), rf"{RANK}: {FC1} is stored twice, under two names; remove one"),
    ("torch", edit_rank(lambda c: c["model"].update(new=torch.ones(1))), r"1 tensors are unknown .*\['new'\]; --ign"),
    ("torch", edit_rank(lambda c: c["model"].update({3: torch.ones(1)})), "model is no dictionary of tensors"),
    ("torch", edit_rank(lambda c: c.update(model=[1])), "model is no dictionary of tensors"),
    ("torch", edit_rank(lambda c: [1]), "not a checkpoint: it has no model"),
    ("torch", edit_rank(lambda c: {"args": c["args"]}), "not a checkpoint: it has no model"),
]


@pytest.mark.parametrize(("name", "damage", "message"), TENSORS)
def test_tensors_that_do_not_fit_are_named(
    name: str, damage: Damage, message: str, sources: dict, tmp_path: Path
) -> None:
    refused(copy(sources, name, tmp_path, damage), message)


def drop(*names: str) -> Damage:
    """Remove rank folders."""
    return lambda folder: [shutil.rmtree(folder / "iter_0000001" / name) for name in names]


def twice(origin: str, target: str) -> Damage:
    """A rank folder under a second name."""
    return lambda folder: shutil.copytree(folder / "iter_0000001" / origin, folder / "iter_0000001" / target)


LAYOUTS = [
    (drop("mp_rank_01_001"), "rank folders are missing for TP2 PP2: mp_rank_01_001"),
    (
        drop("mp_rank_00_001", "mp_rank_01_001"),
        "args say pipeline_model_parallel_size 2, the folders show 1; files are",
    ),
    (
        twice("mp_rank_01_001", "mp_rank_01"),
        "rank folders of different layouts lie in it; remove those of an earlier run",
    ),
    (twice("mp_rank_01_001", "mp_rank_02_001"), "rank folders are missing for TP3 PP2: mp_rank_02_000"),
    (twice("mp_rank_01_001", "mp_rank_x"), "mp_rank_x: not a rank folder's name"),
]


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(("damage", "message"), LAYOUTS)
def test_rank_folders_that_make_up_no_layout_are_named(
    damage: Damage, message: str, ours: bool, sources: dict, tmp_path: Path
) -> None:
    refused(copy(sources, "torch", tmp_path, damage if ours else without_args_json(damage)), message)


PICKLED = [
    ("tensor_model_parallel_size", 4, "args say tensor_model_parallel_size 4, the folders show 2"),
    ("pipeline_model_parallel_size", "x", "args say pipeline_model_parallel_size x, the folders show 2"),
    ("hidden_size", 48, r"embedding.word_embeddings.weight has shape \[19, 24\], TP2 PP2 asks for \[19, 48\]"),
    ("num_attention_heads", 3, "num_attention_heads 3 is not a multiple of num_query_groups 2"),
    ("vocab_size", 99, "embedding.word_embeddings.weight has 38 rows, its settings say 99"),
    ("model_type_hf", 3, "do not say which model family this is; give --model-type-hf"),
]


@pytest.mark.parametrize(("key", "value", "message"), PICKLED)
def test_pickled_args_that_contradict_the_tensors_are_refused(
    key: str, value: object, message: str, sources: dict, tmp_path: Path
) -> None:
    damage = edit_rank(lambda content: setattr(content["args"], key, value))
    refused(copy(sources, "torch", tmp_path, without_args_json(damage)), message)


@pytest.mark.parametrize("name", ["torch", "dist"])
@pytest.mark.parametrize(("key", "value"), [("hidden_size", 48), ("num_attention_heads", 3), ("vocab_size", 99)])
def test_pickled_args_of_another_model_than_args_json_are_refused(
    key: str, value: int, name: str, sources: dict, tmp_path: Path
) -> None:
    file = RANK if name == "torch" else "iter_0000001/common.pt"
    damage = edit_rank(lambda content: setattr(content["args"], key, value), file)
    refused(
        copy(sources, name, tmp_path, damage), rf"args say {key} {value}, its args.json says \d+; one is of another"
    )


MODEL = [
    ("num_layers", 6, "6"),
    ("num_layers", 10**9, "more than any model has"),
    ("hidden_size", "24", "hidden_size is '24', expected a positive integer"),
    ("num_query_groups", 3, "its files do not fit its settings: .*num_query_groups 3|its settings ask for"),
    ("dtype", None, "dtype is None, expected text"),
    ("rotary_base", float("nan"), "rotary_base is nan, expected a finite number"),
    ("family", "foo", "unknown model family 'foo'"),
    ("qk_layernorm", 1, "qk_layernorm is 1, expected true or false"),
    ("layer_types", [3], "layer_types is .*expected a list"),
    ("hf_config", 3, "hf_config is 3, expected an object"),
]


@pytest.mark.parametrize("name", ["torch", "dist"])
@pytest.mark.parametrize(("key", "value", "message"), MODEL)
def test_a_model_in_args_json_that_is_none_or_another_is_refused(
    key: str, value: object, message: str, name: str, sources: dict, tmp_path: Path
) -> None:
    damage = edit_json(ARGS, lambda values: values["model"].update({key: value}))
    assert str(tmp_path / "in" / "iter_0000001") in refused(copy(sources, name, tmp_path, damage), message)


RECORDED = [
    (lambda v: [v], "holds a list, expected an object"),
    (lambda v: v.update(format_version=2), "format version 2, this program reads 1"),
    (lambda v: v.update(layout={}), "does not describe a checkpoint"),
    (lambda v: v["layout"].update(tp="x"), "parallel size of its layout is no positive integer"),
    (lambda v: v["layout"].update(tp=1), "parallel sizes do not fit together|does not hold the files of TP1 PP2"),
    (lambda v: v["layout"].update(pp=3), "parallel sizes do not fit together"),
    (lambda v: v["layout"].update(chunks=[]), "parallel sizes do not fit together"),
    (lambda v: v["layout"].update(chunks=[[[0, 1], [1, 2]]]), "does not hold every layer once"),
    (lambda v: v["layout"].update(chunks=[[[0, 1, 2], [3]]]), "beyond the 1 layers of its stage"),
    (lambda v: v["layout"].update(ep=2), "missing mp_rank_00_000_001"),
    (lambda v: v.update(base=3), "does not describe a checkpoint"),
    (lambda v: v.update(base={"path": 3, "hash": None}), "path is 3, expected text"),
    (lambda v: v.update(iteration="x"), "iteration is 'x', expected a positive integer"),
    (lambda v: v.update(content_hash=3), "content_hash is 3, expected text"),
    (lambda v: v.update(lora={"r": 0, "alpha": 1, "target_modules": []}), "r is 0, expected a positive integer"),
]


@pytest.mark.parametrize(("change", "message"), RECORDED)
def test_an_args_json_that_disagrees_with_itself_or_the_files_is_refused(
    change: Callable, message: str, sources: dict, tmp_path: Path
) -> None:
    refused(copy(sources, "torch", tmp_path, edit_json(ARGS, change)), message)


def test_the_type_in_args_json_gives_way_to_that_of_the_tensors(sources: dict, tmp_path: Path) -> None:
    for name in ("torch", "dist"):
        damage = edit_json(ARGS, lambda values: values["model"].update(dtype="float32"))
        folder = copy(sources, name, tmp_path / name, damage)
        main(["--load-dir", str(folder), "--save-dir", str(tmp_path / name / "out")])
        assert json.loads((tmp_path / name / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


CONFIG = [
    *[
        ("-" + key, None, f"needs '{key}' in its config.json")
        for key in ("hidden_size", "num_hidden_layers", "vocab_size")
    ],
    ("-architectures", None, "architectures"),
    ("architectures", ["FooForCausalLM"], r"architectures \['FooForCausalLM'\] are not supported"),
    ("architectures", "Qwen3ForCausalLM", "architectures is 'Qwen3ForCausalLM', expected a list of class names"),
    *[("hidden_size", value, "hidden_size") for value in ("24", -1, 0, 2.5, [], {}, True, None, 10**30)],
    ("num_hidden_layers", 10**9, "num_layers is 1000000000, more than any model has"),
    ("num_key_value_heads", 4, "num_attention_heads 6 is not a multiple of num_query_groups 4"),
    ("tie_word_embeddings", "yes", "tie_word_embeddings is 'yes', expected true or false"),
    *[("rope_theta", value, "rotary_base|wrong type") for value in ("x", 0, -1, [], float("nan"), True)],
    *[("rope_scaling", value, "wrong type|rope_scaling of type") for value in ("x", 3, [1], {"rope_type": "new"})],
    *[("quantization_config", value, "quantization_config is") for value in ("x", 3, [1])],
    ("quantization_config", {"quant_method": "gptq"}, "quantised by 'gptq', which cannot be read"),
    ("hidden_act", "relu", "hidden_act is 'relu'; for qwen3 only 'silu' is supported"),
    ("hidden_size", 32, r"has shape \[37, 24\], config.json asks for \[37, 32\]"),
    ("rms_norm_eps", "small", "norm_epsilon is 'small', expected a finite number"),
]


@pytest.mark.parametrize(("key", "value", "message"), CONFIG)
def test_a_config_that_describes_no_model_is_refused(
    key: str, value: object, message: str, sources: dict, tmp_path: Path
) -> None:
    change = (lambda raw: raw.pop(key[1:]) and None) if key[0] == "-" else (lambda raw: raw.update({key: value}))
    folder = copy(sources, "hf", tmp_path, edit_json("config.json", change))
    assert str(folder) in refused(folder, message)


@pytest.mark.parametrize("text", ["9", "../../etc", "²", "9" * 5000, "1 2", "-1"])
def test_a_tracker_that_points_nowhere_is_refused(text: str, sources: dict, tmp_path: Path) -> None:
    damage = lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text(text)  # noqa: E731
    refused(
        copy(sources, "torch", tmp_path, damage), "does not exist; correct the tracker|expected an iteration number"
    )


def test_unknown_tensors_of_rank_files_are_left_out_on_request_and_said(
    sources: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    damage = edit_rank(lambda content: content["model"].update(new=torch.ones(1)))
    folder = copy(sources, "torch", tmp_path, damage)
    main(["--load-dir", str(folder), "--save-dir", str(tmp_path / "out"), "--ignore-unknown"])
    assert "1 unknown tensors are left out: ['new']" in capsys.readouterr().err
    assert content_hash(HFSource(tmp_path / "out")) == content_hash(HFSource(sources["hf"]))


@pytest.mark.parametrize("name", ["optimizer", "distrib_optim.pt"])
def test_optimizer_state_that_is_left_behind_is_said(
    name: str, sources: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def damage(folder: Path) -> None:
        if name == "optimizer":
            edit_rank(lambda content: content.update(optimizer={"step": 3}))(folder)
        else:
            torch.save({}, folder / RANK.replace("model_optim_rng.pt", name))

    folder = copy(sources, "torch", tmp_path, damage)
    main(["--load-dir", str(folder), "--save-dir", str(tmp_path / "out")])
    told = [line for line in capsys.readouterr().err.splitlines() if "optimizer state" in line]
    assert told == [f"{folder}/iter_0000001: optimizer state and schedules are left out; weights only"]
