"""What cannot be done is refused in one line that names both sides, before anything is written."""

import functools
import json
import os
import shutil
import socket
from pathlib import Path
from unittest import mock

import pytest

from mindspeed_llm.data.templates import TEMPLATES_FILE
from tests.distributed.pool import Pool
from tests.fixtures import (
    LORA,
    data,
    done,
    hf_model,
    launch,
    make_hf,
    refused,
    run_on_rank,
    scratch,
    training,
    tuned,
    write_tokenizer,
)

TP = "--tensor-model-parallel-size"
PP = "--pipeline-model-parallel-size"

USAGE = {
    "an unknown flag names the nearest": (("--lora-rang", 4), ["lora.rang", "--lora-r"]),
    "an unknown stage names the known": (("--stage", "sftt"), ["sftt", "sft"]),
    "an unknown target names the known": (("--lora-target-modules", "linear_qvk"), ["linear_qvk", "linear_qkv"]),
    "no data": (("--data-path", None), ["--data-path is missing"]),
    "no base": (("--load", None), ["--load is missing"]),
    "a model flag that contradicts": (("--hidden-size", 32), ["hidden.size", "32", "24"]),
    "a norm epsilon that contradicts": (("--norm-epsilon", 1e-5), ["norm.epsilon", "1e-05", "1e-06"]),
    "two lengths": (("--train-iters", 3, "--epochs", 2), ["--train-iters", "--epochs"]),
    "a warm-up longer than the run": (("--lr-warmup-iters", 6), ["warm-up of 6 steps", "6 steps"]),
    "a global batch that does not divide": (("--global-batch-size", 5), ["batch-size 5", "--micro-batch-size 2"]),
    "alpha without targets": (("--lora-target-modules", None, "--lora-r", 4), ["--lora-target-modules"]),
    "resuming and overwriting": (("--auto-resume", "--overwrite"), ["--auto-resume", "--overwrite"]),
    "dropout": (("--lora-dropout", 1.0), ["--lora-dropout 1.0", "below 1"]),
}  # fmt: skip


def argv(tmp_path: Path, *more: object, **options: object) -> list:
    return training(tmp_path / "run", *more, **options)


def nothing_written(tmp_path: Path) -> bool:
    return not (tmp_path / "run").exists() and not (tmp_path / "run_logs").exists()


@pytest.mark.parametrize("name", USAGE)
def test_wrong_command_lines_exit_2(name: str, tmp_path: Path) -> None:
    more, patterns = USAGE[name]
    lora = "--lora-target-modules" not in more
    words = argv(tmp_path, *(more if lora else (*LORA[:4], *more)), lora=lora)
    refused(launch(1, "posttrain_gpt.py", words), 2, *patterns)
    assert nothing_written(tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "more", "patterns"),
    [
        (1, (TP, 2), ["1 processes", "tensor-model-parallel-size 2"]),
        (4, (TP, 4), ["num_query_groups|query groups|4", "2"]),
        (2, (PP, 3), ["4", "3"]),
        (2, (PP, 2, "--num-layers-per-virtual-pipeline-stage", 1, "--global-batch-size", 6), ["3 micro-batches", "2"]),
        (2, (TP, 2, "--sequence-parallel", "--seq-length", 63), ["63", "2"]),
        (2, (PP, 2, "--num-layers-per-virtual-pipeline-stage", 3), ["3"]),
    ],
)
def test_layouts_that_do_not_divide_name_both_numbers(size: int, more: tuple, patterns: list, tmp_path: Path) -> None:
    words = argv(tmp_path, *more)
    if "--seq-length" in more:
        words.remove("--no-pad-to-seq-lengths")
    refused(launch(size, "posttrain_gpt.py", words), 2, *patterns)
    assert nothing_written(tmp_path)


def test_load_of_nothing_is_never_a_random_start(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, text in ((tmp_path / "nowhere", "no such folder"), (empty, "no model")):
        refused(launch(1, "posttrain_gpt.py", argv(tmp_path, "--load", folder)), 1, str(folder), text)
        refused(launch(1, "posttrain_gpt.py", argv(tmp_path, "--lora-load", folder)), 1, str(folder))
    (empty / "latest_checkpointed_iteration.txt").write_text("7")
    refused(launch(1, "posttrain_gpt.py", argv(tmp_path, "--load", empty)), 1, "says 7, but .*iter_0000007 does not")
    assert nothing_written(tmp_path)


def test_an_adapter_folder_without_adapter_and_a_base_folder_that_is_one_are_told_apart(tmp_path: Path) -> None:
    full = scratch() / "bad_input_full"
    if not full.exists():
        done(launch(1, "posttrain_gpt.py", training(full, lora=False, steps=3)))
    refused(launch(1, "posttrain_gpt.py", argv(tmp_path, "--lora-load", full)), 1, "holds no LoRA weights", str(full))
    refused(launch(1, "posttrain_gpt.py", argv(tmp_path, "--load", tuned())), 1, "adapter without its base")
    refused(launch(1, "inference.py", ["--load", tuned(), "--prompt", "x"]), 1, "adapter without its base")
    assert nothing_written(tmp_path)


def test_an_adapter_of_another_base_is_refused_with_both_hashes(tmp_path: Path) -> None:
    other = hf_model(seed=5)
    text = r"trained on the base .* \(content \w{12}\), but .* has content \w{12}; give that base"
    refused(launch(1, "posttrain_gpt.py", argv(tmp_path, "--load", other, "--lora-load", tuned())), 1, text)
    refused(launch(1, "inference.py", ["--load", other, "--lora-load", tuned(), "--prompt", "x"]), 1, text)
    smaller = launch(1, "posttrain_gpt.py", argv(tmp_path, "--load", hf_model(tied=True), "--lora-load", tuned()))
    refused(smaller, 1, "adapter of another model", "tie_word_embeddings")
    assert nothing_written(tmp_path)


def test_flags_that_contradict_a_saved_adapter_are_refused(tmp_path: Path) -> None:
    words = argv(tmp_path, "--lora-load", tuned(), "--lora-r", 8, "--lora-alpha", 16, lora=False)
    refused(launch(1, "posttrain_gpt.py", words), 2, "--lora-r says 8, the adapter says 3", "alpha says 16.*6")


def test_data_of_another_tokenizer_template_or_thinking_mode_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    other.mkdir()
    write_tokenizer(other, corpus_seed=50)
    words = argv(tmp_path, "--tokenizer-name-or-path", other)
    refused(
        launch(1, "posttrain_gpt.py", words), 1, "made with the tokenizer in .* the model's has", "preprocess again"
    )
    words = argv(tmp_path, "--prompt-type", "alpaca")
    refused(launch(1, "posttrain_gpt.py", words), 1, "--prompt-type qwen3, the run asks for alpaca")
    words = argv(tmp_path, "--enable-thinking", "true")
    refused(launch(1, "posttrain_gpt.py", words), 1, "--enable-thinking none, the run asks for true")
    templates = json.loads(TEMPLATES_FILE.read_text(encoding="utf-8"))
    next(entry for entry in templates if entry["name"] == "qwen3")["default_system"] = "Be brief."
    changed = tmp_path / "templates.json"
    changed.write_text(json.dumps(templates))
    words = argv(tmp_path, "--prompt-type", "qwen3", "--prompt-type-path", changed)
    refused(launch(1, "posttrain_gpt.py", words), 1, "another text of template qwen3", "--prompt-type-path")
    words = argv(tmp_path, "--data-path", data(template="alpaca"), "--lora-load", tuned())
    refused(launch(1, "posttrain_gpt.py", words), 1, "trained with template qwen3", "made with alpaca")
    assert nothing_written(tmp_path)


def test_missing_and_truncated_data_are_named(tmp_path: Path) -> None:
    refused(launch(1, "posttrain_gpt.py", argv(tmp_path, "--data-path", tmp_path / "gone")), 1, "no data .*gone")
    for file in data().parent.glob(f"{data().name}_*"):
        shutil.copy(file, tmp_path / file.name)
    cut = tmp_path / f"{data().name}_packed_labels_document.bin"
    os.truncate(cut, cut.stat().st_size - 100)
    refused(launch(1, "posttrain_gpt.py", argv(tmp_path, "--data-path", tmp_path / data().name)), 1, cut.name)
    assert nothing_written(tmp_path)


@pytest.mark.parametrize("flag", ["--load", "--lora-load"])
def test_a_truncated_checkpoint_file_is_named(flag: str, tmp_path: Path) -> None:
    from tests.fixtures import mcore_model

    copy = tmp_path / "copy"
    shutil.copytree(mcore_model(1, 1) if flag == "--load" else tuned(), copy)
    file = next(copy.rglob("*.pt"))
    os.truncate(file, file.stat().st_size * 2 // 3)
    refused(launch(1, "posttrain_gpt.py", argv(tmp_path, flag, copy)), 1, str(file))
    assert nothing_written(tmp_path)


def test_a_truncated_weight_file_and_a_broken_config_of_an_hf_folder_are_named(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf")
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 5000)
    refused(launch(1, "posttrain_gpt.py", argv(tmp_path, "--load", folder)), 1, str(weights))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"})[:-3])
    refused(launch(1, "posttrain_gpt.py", argv(tmp_path, "--load", folder)), 1, "config.json")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Gwen3ForCausalLM"]}))
    refused(launch(1, "posttrain_gpt.py", argv(tmp_path, "--load", folder)), 1, "Gwen3ForCausalLM", "Qwen3ForCausalLM")
    assert nothing_written(tmp_path)


def test_a_run_that_is_complete_has_nothing_to_continue(tmp_path: Path) -> None:
    text = "at step 12 of 12: nothing is left to train; raise --train-iters"
    refused(launch(1, "posttrain_gpt.py", argv(tmp_path, "--lora-load", tuned(), steps=12)), 1, text)
    assert nothing_written(tmp_path)


def test_a_save_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    refused(launch(1, "posttrain_gpt.py", argv(tmp_path)), 1, "is a file, expected a folder")


def unjoined(rank: int) -> None:
    """What a process of a launcher does before the program begins: nothing."""


def test_a_port_that_is_taken_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    alone = Pool(1, prepare=unjoined)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        around = functools.partial(mock.patch.dict, "os.environ", MASTER_PORT=str(port))
        words = [str(word) for word in argv(tmp_path)]
        outcomes = alone.run(run_on_rank, script="posttrain_gpt.py", argv=words, cwd=str(tmp_path), around=around)
    alone.close()
    refused(outcomes, 1, f"127.0.0.1:{port}.*MASTER_PORT")
    assert nothing_written(tmp_path)
