"""The recipes: upstream's names, commands that the real options parse, and the launcher's promises."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_llm.arguments.parser import given, parse
from mindspeed_llm.arguments.programs import PROGRAMS
from mindspeed_llm.arguments.schema import Program
from tests.conftest import REPO, free_port

FOLDER = REPO / "examples" / "mcore"
RECIPES = sorted(FOLDER.glob("*/*.sh"))
SIZES = ("0point6b", "1point7b", "4b", "8b", "14b", "32b")
LAYOUTS = {"0point6b": (1, 1), "1point7b": (1, 1), "4b": (1, 1), "8b": (1, 2), "14b": (2, 2), "32b": (4, 1)}
KINDS = (
    "tune_qwen3_{}_4K_full_ptd",
    "tune_qwen3_{}_4K_lora_ptd",
    "generate_qwen3_{}_ptd",
    "generate_qwen3_{}_lora_ptd",
    "evaluate_qwen3_{}_ptd",
    "evaluate_qwen3_{}_lora_ptd",
)
FAMILY = (
    "ckpt_convert_qwen3_hf2mcore",
    "ckpt_convert_qwen3_mcore2hf",
    "ckpt_convert_qwen3_mcore2hf_lora",
    "data_convert_qwen3_instruction",
)
PREFERENCES = ("data_convert_qwen3_pairwise", "dpo_qwen3_8b_4K_lora_ptd")
ARCHITECTURE = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "rotary_base"}


def run_recipe(recipe: Path, *words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("TP", "PP", "RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
    environment = {**inherited, "MINDSPEED_LLM_DEVICE": "cpu", "PYTHON": sys.executable, **environment}
    return subprocess.run(
        ["bash", str(recipe), *words], capture_output=True, text=True, cwd=cwd, env=environment, timeout=240
    )


def dry_run(recipe: Path, *words: str, cwd: Path, **environment: str) -> tuple[list[str], str, Program]:
    """(all words of the printed command, script, options as the real parser reads them)."""
    result = run_recipe(recipe, *words, cwd=cwd, DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    command = shlex.split(result.stdout)
    script, index = next((Path(w).name, i) for i, w in enumerate(command) if Path(w).name in PROGRAMS)
    return command, script, parse(PROGRAMS[script], command[index + 1 :], script)


def recipe(name: str) -> Path:
    return FOLDER / "qwen3" / f"{name}.sh"


def test_the_forty_qwen3_recipes_have_upstreams_names() -> None:
    wanted = {kind.format(size) for kind in KINDS for size in SIZES} | set(FAMILY)
    assert len(wanted) == 40
    assert {path.stem for path in (FOLDER / "qwen3").glob("*.sh")} == wanted | set(PREFERENCES)


def test_the_recipe_of_preferences_reads_what_the_recipe_of_pairs_writes(tmp_path: Path) -> None:
    _, _, made = dry_run(recipe("data_convert_qwen3_pairwise"), cwd=tmp_path)
    assert made.handler_name == "AlpacaStylePairwiseHandler"
    _, _, options = dry_run(recipe("dpo_qwen3_8b_4K_lora_ptd"), cwd=tmp_path, DPO_BETA="0.3", DPO_LOSS_TYPE="ipo")
    assert options.data.data_path == [made.output_prefix]
    assert (options.training.stage, options.data.is_pairwise_dataset) == ("dpo", True)
    preference = options.preference
    assert (preference.dpo_beta, preference.dpo_loss_type, preference.pref_ftx) == (0.3, "ipo", 0.0)
    assert options.lora.lora_fusion


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_short_and_its_command_is_understood(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    command, _, options = dry_run(path, cwd=tmp_path)
    assert not given(options) & ARCHITECTURE
    assert not options.parsed.accepted, "a recipe of ours gives nothing that is not needed"
    assert Path(command[0]) == Path(sys.executable)
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


@pytest.mark.parametrize("size", SIZES)
def test_layouts_and_hyperparameters_are_those_published_for_each_size(size: str, tmp_path: Path) -> None:
    tp, pp = LAYOUTS[size]
    command, _, options = dry_run(recipe(f"tune_qwen3_{size}_4K_lora_ptd"), cwd=tmp_path)
    assert (options.parallel.tensor_model_parallel_size, options.parallel.pipeline_model_parallel_size) == (tp, pp)
    assert command[command.index("--nproc_per_node") + 1] == str(tp * pp)
    optimizer = options.optimizer
    assert (optimizer.lr, optimizer.min_lr, optimizer.lr_warmup_fraction) == (1.25e-5, 1.25e-7, 0.01)
    assert (options.lora.lora_r, options.lora.lora_alpha, options.lora.lora_fusion) == (16, 32, True)
    assert options.training.global_batch_size == (64 if size == "14b" else 16)
    _, _, full = dry_run(recipe(f"tune_qwen3_{size}_4K_full_ptd"), cwd=tmp_path)
    assert full.lora.lora_target_modules is None
    assert full.optimizer == optimizer


def test_variables_come_from_the_environment_and_options_can_be_added(tmp_path: Path) -> None:
    command, _, options = dry_run(
        recipe("tune_qwen3_8b_4K_lora_ptd"), "--lr", "3e-4", "--data-path", "a b/c",
        cwd=tmp_path, TP="2", PP="1", GBS="32", NPROC_PER_NODE="4", NNODES="2", NODE_RANK="1", MASTER_PORT="7001",
    )  # fmt: skip
    assert options.parallel.tensor_model_parallel_size == 2
    assert options.training.global_batch_size == 32
    assert options.optimizer.lr == 3e-4
    assert options.data.data_path == ["a b/c"]
    for name, value in (("nproc_per_node", "4"), ("nnodes", "2"), ("node_rank", "1"), ("master_port", "7001")):
        assert command[command.index(f"--{name}") + 1] == value


def test_resume_asks_for_the_newest_checkpoint(tmp_path: Path) -> None:
    _, _, options = dry_run(recipe("tune_qwen3_8b_4K_lora_ptd"), cwd=tmp_path, RESUME="1")
    assert options.checkpoint.auto_resume
    _, _, options = dry_run(recipe("tune_qwen3_8b_4K_lora_ptd"), cwd=tmp_path)
    assert not options.checkpoint.auto_resume


def test_a_question_with_spaces_and_quotes_reaches_the_program_whole(tmp_path: Path) -> None:
    question = 'what\'s "this" & that $HOME?'
    _, _, options = dry_run(recipe("generate_qwen3_8b_lora_ptd"), cwd=tmp_path, PROMPT=question)
    assert options.generation.prompt == question
    _, _, options = dry_run(recipe("generate_qwen3_8b_lora_ptd"), cwd=tmp_path)
    assert options.generation.prompt is None


@pytest.mark.parametrize("name", ["tune_qwen3_8b_4K_lora_ptd", "ckpt_convert_qwen3_hf2mcore"])
def test_a_mistyped_option_is_one_line_and_status_two_before_anything_starts(name: str, tmp_path: Path) -> None:
    result = run_recipe(recipe(name), "--no-such-flag", cwd=tmp_path)
    assert result.returncode == 2
    assert "unknown option --no-such-flag" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_of_a_recipe_is_the_help_of_its_program(tmp_path: Path) -> None:
    result = run_recipe(recipe("generate_qwen3_8b_lora_ptd"), "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: inference.py")
    assert result.stdout.count("usage:") == 1


def test_a_taken_port_is_said_in_one_line_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        result = run_recipe(recipe("tune_qwen3_8b_4K_lora_ptd"), cwd=tmp_path, MASTER_PORT=port)
    assert result.returncode == 1
    assert f"port {port} on this machine is taken" in result.stderr
    assert "MASTER_PORT=" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_exit_status_survives_the_log_and_the_log_is_kept(tmp_path: Path) -> None:
    result = run_recipe(recipe("ckpt_convert_qwen3_hf2mcore"), cwd=tmp_path, LOAD_DIR="./nowhere")
    assert result.returncode == 1
    log = (tmp_path / "logs" / "ckpt_convert_qwen3_hf2mcore.log").read_text()
    assert "nowhere" in log
    assert result.stdout == log


def test_the_common_part_finds_cann_where_it_is_said_to_be(tmp_path: Path) -> None:
    set_env = tmp_path / "set_env.sh"
    set_env.write_text('echo "cann: $NEVER_SET"\n')
    result = run_recipe(recipe("ckpt_convert_qwen3_hf2mcore"), cwd=tmp_path, DRY_RUN="1", ASCEND_SET_ENV=str(set_env))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("cann: \n")


@pytest.mark.parametrize("device_words", [("--device", "cpu"), ("--device=cpu",)])
def test_on_the_cpu_the_processes_share_the_cores(device_words: tuple[str, ...], tmp_path: Path) -> None:
    common = FOLDER / "common.sh"
    probe = tmp_path / "probe.sh"
    probe.write_text(
        f'TP=2; PP=1; source "{common}"; _execute() {{ echo "threads=$OMP_NUM_THREADS $*"; }}\n'
        f"launch probe posttrain_gpt.py --lr 1e-5 {' '.join(device_words)}\n"
    )
    result = run_recipe(probe, cwd=tmp_path, MINDSPEED_LLM_DEVICE="auto", MASTER_PORT=str(free_port()))
    assert f"threads={max(len(os.sched_getaffinity(0)) // 2, 1)} " in result.stdout, result.stderr
    assert "--nproc_per_node 2" in result.stdout
