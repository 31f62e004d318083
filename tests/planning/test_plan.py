"""`--plan`, `--dry-run` and the check of memory: what they print, refuse and leave alone."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.programs import PosttrainOptions
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.device.cards import CARDS, GIB, card
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.planning.estimate import fullest
from mindspeed_llm.planning.job import Job
from mindspeed_llm.planning.propose import flags, propose
from mindspeed_llm.planning.weights import ModelWeights, held
from mindspeed_llm.training.layout_rules import training_layout
from mindspeed_llm.training.planned import check_memory, job_of, wish_of
from tests.conftest import REPO
from tests.fixtures import done, launch, refused, training
from tests.planning.jobs import experts_model, job, model

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Qwen3-8B's config.json, without weights."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B), encoding="utf-8")
    return tmp_path


def words(folder: Path, *more: Any) -> list[str]:
    given = ["--plan", "--load", folder, "--bf16", "--lora-target-modules", *TARGETS, *more]
    return [str(word) for word in given]


def options_of(folder: Path, *more: Any) -> PosttrainOptions:
    return parse(PosttrainOptions, words(folder, *more), "posttrain_gpt.py")


def test_a_plan_needs_no_weights_no_process_group_and_no_megatron_core(folder: Path) -> None:
    code = (
        "import sys; from mindspeed_llm.training.posttrain import main; status = main(sys.argv[1:]);"
        "assert not [name for name in sys.modules if name.startswith('megatron')];"
        "import torch; assert not torch.distributed.is_initialized(); sys.exit(status)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words(folder, "--cards", 8, "--card", "h100")],
        capture_output=True, text=True, cwd=REPO, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "8 x h100, 80 GiB" in run.stdout and "assumed, not measured" in run.stdout
    rows = [line for line in run.stdout.splitlines() if line.startswith("TP")]
    assert len(rows) == 10
    assert "--micro-batch-size" in run.stdout.splitlines()[-1]


def test_layouts_that_fit_come_first_and_the_fastest_of_them_first(folder: Path) -> None:
    wish = wish_of(options_of(folder, "--cards", 8, "--card-memory", "24GiB", "--seq-length", 4096))
    found = propose(wish)
    fits = [one.memory.total <= wish.usable for one in found]
    assert any(fits) and not all(fits) and fits == sorted(fits, reverse=True)
    rates = [one.rate for one, fit in zip(found, fits, strict=True) if fit]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_options_of_a_proposal_make_the_job_that_was_estimated(stage: str, folder: Path) -> None:
    found = propose(wish_of(options_of(folder, "--cards", 16, "--card-memory", "32GiB", "--stage", stage)))
    table = WeightTable(found[0].job.model)
    for one in found[:: max(1, len(found) // 25)]:
        options = options_of(folder, "--cards", 16, "--stage", stage, *flags(one.job))
        layout = training_layout(options, table)
        made = job_of(options, one.job.model, one.job.lora, layout, 16, one.job.length, one.job.accelerator)
        assert made == one.job, shlex.join(flags(one.job))


def test_sizes_that_are_given_are_kept(folder: Path) -> None:
    given = ("--tensor-model-parallel-size", 4, "--micro-batch-size", 2)
    found = propose(wish_of(options_of(folder, "--cards", 8, *given)))
    assert {(one.job.layout.tp, one.job.micro_batch) for one in found} == {(4, 2)}


def test_a_plan_without_any_layout_says_what_does_not_divide(folder: Path) -> None:
    with pytest.raises(UsageError, match="no layout of 8 cards divides 36 layers, 32 heads and 3 rows"):
        propose(wish_of(options_of(folder, "--cards", 8, "--global-batch-size", 3, "--tensor-model-parallel-size", 1)))


def test_a_plan_that_fits_nowhere_exits_1_and_says_what_is_missing(folder: Path, capsys: Any) -> None:
    from mindspeed_llm.training.planned import print_plan

    assert print_plan(options_of(folder, "--cards", 1, "--card-memory", "8GiB")) == 1
    assert "none fits: the smallest needs" in capsys.readouterr().out


def test_lengths_come_from_the_data(tmp_path: Path) -> None:
    options = parse(
        PosttrainOptions,
        [str(word) for word in training(tmp_path / "run", "--plan", "--cards", 2, "--no-pad-to-seq-lengths")],
        "posttrain_gpt.py",
    )
    lengths = wish_of(options).lengths
    assert 0 < lengths.mean < lengths.longest <= 64
    assert 0 < lengths.trained < 1


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_counted_once_however_the_model_is_cut(layout: tuple[int, int], tied: bool) -> None:
    sums = ModelWeights(model(4, 1000, tied), None)
    cut = Layout.create(4, *layout)
    copies = 1000 * 1024 if tied and cut.pp > 1 else 0
    whole = sum(one.shape[0] * (one.shape[1] if len(one.shape) > 1 else 1) for one in sums.table.entries.values())
    replicated = sum(
        (cut.tp - 1) * piece.rows * piece.columns * count
        for rank in range(cut.pp) for piece, count in sums.stage(cut, rank).items() if not piece.cut
    )  # fmt: skip
    assert sum(held(sums.stage(cut, rank), cut, False).total for rank in range(cut.pp)) * cut.tp == (
        whole + copies + replicated
    )


def test_experts_are_spread_over_their_own_ranks() -> None:
    sums = ModelWeights(experts_model(), None)
    whole = held(sums.stage(Layout.create(2), 0), Layout.create(2), False)
    for ep, etp in ((2, 1), (4, 1), (2, 2)):
        cut = Layout.create(2, etp, ep=ep, etp=etp)
        assert held(sums.stage(cut, 0), cut, False).expert == whole.expert // (ep * etp)


def of_device(name: str, nbytes: int) -> Any:
    return SimpleNamespace(name=name, capacity=lambda: nbytes)


def run_options(*more: str) -> PosttrainOptions:
    return parse(PosttrainOptions, ["--load", "x", "--data-path", "y", *more], "posttrain_gpt.py")


def test_more_than_the_device_has_is_refused_with_both_values_and_a_remedy() -> None:
    big = job()
    need = fullest(big, ModelWeights(big.model, big.lora))[0].total
    check_memory(run_options(), big, of_device("npu", need), 2)
    with pytest.raises(InputError) as refused_at:
        check_memory(run_options(), big, of_device("npu", need - 1), 2)
    for part in (f"{need / GIB:.2f} GiB", "weights", "--recompute-granularity", "--no-memory-check"):
        assert part in str(refused_at.value)
    check_memory(run_options("--no-memory-check"), big, of_device("npu", 1), 2)


def test_processes_on_a_cpu_share_its_memory() -> None:
    big: Job = job()
    need = fullest(big, ModelWeights(big.model, big.lora))[0].total
    check_memory(run_options(), big, of_device("cpu", need), 1)
    with pytest.raises(InputError, match="2 processes"):
        check_memory(run_options(), big, of_device("cpu", need), 2)


def test_a_known_card_takes_what_the_user_knows_better() -> None:
    own = card("h100", memory=70 * GIB, tflops=400.0, gbps=200.0)
    assert (own.memory, own.rate, own.link) == (70 * GIB, 400e12, 25e9)
    assert "as given" in own.origin and own.node == CARDS["h100"].node


USAGE = {
    "no cards": (("--plan",), "--plan needs --cards"),
    "cards without a plan": (("--cards", "8"), "--cards 8"),
    "two ways not to train": (("--plan", "--cards", "8", "--dry-run"), "one of the two"),
    "a card nobody knows": (("--plan", "--cards", "8", "--card", "h1000"), "h100"),
}


@pytest.mark.parametrize("name", USAGE)
def test_contradicting_options_are_refused(name: str) -> None:
    more, pattern = USAGE[name]
    with pytest.raises(UsageError, match=pattern):
        parse(PosttrainOptions, [*more], "posttrain_gpt.py")


@pytest.mark.distributed
def test_a_dry_run_prints_both_peaks_of_every_rank_and_saves_nothing(tmp_path: Path) -> None:
    given = ("--dry-run", "--pipeline-model-parallel-size", 2, "--global-batch-size", 4)
    outcome = done(launch(2, "posttrain_gpt.py", training(tmp_path / "run", *given)))
    lines = [line.split() for line in outcome.out.splitlines() if line.startswith("rank ")]
    assert [line[1] for line in lines] == ["0", "1"]
    for line in lines:
        weights = float(line[4]), float(line[6])
        assert weights[0] == weights[1] > 0
    assert "dry run: one step" in outcome.out
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_a_run_that_cannot_fit_is_refused_before_the_model_is_built(tmp_path: Path) -> None:
    given = ("--micro-batch-size", 1 << 22, "--global-batch-size", 1 << 22)
    message = refused(launch(1, "posttrain_gpt.py", training(tmp_path / "run", *given)), 1, "GiB", "--no-memory-check")
    assert "the machine has free" in message
    assert not (tmp_path / "run").exists()
