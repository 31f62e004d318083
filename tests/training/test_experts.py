"""Training programs on a model with experts, and with sequences cut over processes: save, stop, go on elsewhere."""

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from mindspeed_llm.checkpoint.atomic import TRACKER
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.formats.torch_file import write_torch_file
from mindspeed_llm.checkpoint.open import open_base
from tests.fixtures import (
    VOCABULARY,
    close,
    done,
    hf_model,
    launch,
    losses,
    once,
    records,
    refused,
    same,
    scratch,
    training,
    weights,
    write_tokenizer,
)
from tests.models.tiny_moe import ATTENTION, QWEN_MOE, build, tiny
from tests.training import faults

TP, EP, ETP, CP = (f"--{name}-parallel-size" for name in ("tensor-model", "expert-model", "expert-tensor", "context"))
SP, OPTIMIZER = "--sequence-parallel", "--use-distributed-optimizer"
SPREAD = (2, (TP, 2, SP, EP, 2, ETP, 1))
LAYOUTS = {
    "EP2, distributed optimizer": (2, (EP, 2, OPTIMIZER)),
    "TP2 SP EP2 ETP1": SPREAD,
    "CP2": (2, (CP, 2)),
    "TP2 SP EP2 ETP2 DP2": (4, (TP, 2, SP, EP, 2, OPTIMIZER)),
}


@once
def moe_model() -> Path:
    """An HF folder of a Qwen3-MoE with a tokenizer; its config.json asks for the load-balancing loss."""
    values = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "output_router_logits": True}
    one = tiny("program", "Qwen3MoeConfig", ATTENTION, QWEN_MOE, values, router_aux_loss_coef=0.05, eos_token_id=320)
    folder = scratch() / "hf_moe"
    build(one).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def argv(save: Path, *more: object, **options: object) -> list:
    """A command line of six steps, row by row; Adam's epsilon keeps it from magnifying rounding."""
    return training(save, "--load", moe_model(), "--adam-eps", 1e-4, "--micro-batch-size", 1, *more, **options)


def run(size: int, *words: object, **more: object) -> str:
    return done(launch(size, "posttrain_gpt.py", words, **more)).out


@pytest.fixture(scope="module")
def whole() -> Path:
    """Six steps without a stop, in one process."""
    save = scratch() / "experts_whole"
    run(1, *argv(save, "--save-interval", 3))
    return save


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_goes_on_bit_for_bit_at_its_layout_and_equals_one_process(name: str, whole: Path, tmp_path: Path) -> None:
    size, layout = LAYOUTS[name]
    run(size, *argv(tmp_path / "through", *layout))
    run(size, *argv(tmp_path / "parts", *layout), around=faults.terminated_in_step_3)
    assert (tmp_path / "parts" / TRACKER).read_text() == "3"
    assert "resumed at step 3" in run(size, *argv(tmp_path / "parts", *layout, "--auto-resume"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "through")
    same(weights(tmp_path / "parts"), weights(tmp_path / "through"))
    assert losses(tmp_path / "through") == pytest.approx(losses(whole), rel=1e-5)
    close(weights(tmp_path / "through"), weights(whole), 1e-4)
    balance = [record["load_balancing_loss"] for record in records(tmp_path / "through")]
    assert balance == pytest.approx([record["load_balancing_loss"] for record in records(whole)], rel=1e-5)
    assert all(1 <= value < 8 for value in balance)


@pytest.mark.distributed
def test_a_run_goes_on_at_other_layouts_to_rounding(whole: Path, tmp_path: Path) -> None:
    size, spread = SPREAD
    words = argv(tmp_path / "parts", "--lora-load", whole / "iter_0000003", *spread, "--save-interval", 2)
    assert "resumed at step 3" in run(size, *words)
    files = sorted(path.parent.name for path in (tmp_path / "parts/iter_0000004").rglob("model_optim_rng.pt"))
    assert files == ["mp_rank_00_000", "mp_rank_01_001"]
    run(2, *argv(tmp_path / "last", "--lora-load", tmp_path / "parts/iter_0000004", EP, 2))
    assert losses(tmp_path / "parts") == pytest.approx(losses(whole)[3:], rel=1e-5)
    assert losses(tmp_path / "last") == pytest.approx(losses(whole)[4:], rel=1e-5)
    close(weights(tmp_path / "parts"), weights(whole), 1e-4)
    close(weights(tmp_path / "last"), weights(whole), 1e-4)


@pytest.mark.distributed
def test_full_tuning_trains_routers_too_and_goes_on_elsewhere(tmp_path: Path) -> None:
    run(1, *argv(tmp_path / "whole", lora=False))
    kept = (EP, 2, "--ckpt-format", "torch_dist")
    run(2, *argv(tmp_path / "parts", *kept, lora=False), around=faults.terminated_in_step_3)
    size, spread = SPREAD
    run(size, *argv(tmp_path / "parts", "--auto-resume", *spread, lora=False))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    found = weights(tmp_path / "parts")
    close(found, weights(tmp_path / "whole"), 1e-4)
    assert found["exp_avg/decoder.layers.0.mlp.router.weight"].any()


@pytest.mark.distributed
def test_bf16_with_the_distributed_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    layout = ("--bf16", EP, 2, OPTIMIZER)
    run(2, *argv(tmp_path / "through", *layout))
    kept = (*layout, "--ckpt-format", "torch_dist", "--async-save")
    run(2, *argv(tmp_path / "parts", *kept), around=faults.terminated_in_step_3)
    run(2, *argv(tmp_path / "parts", *layout, "--auto-resume"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "through")
    same(weights(tmp_path / "parts"), weights(tmp_path / "through"))


@pytest.mark.distributed
def test_the_exported_model_is_base_and_adapter_merged_expert_by_expert(tmp_path: Path) -> None:
    size, spread = SPREAD
    run(size, *argv(tmp_path / "run", *spread, "--save-safetensors", "--lora-ckpt-filter", "false"))
    (saved,) = (tmp_path / "run").glob("iter_*")
    found, base = HFSource(saved / "hf"), open_base(moe_model())
    adapter = weights(tmp_path / "run")
    for name in base.names():
        module = f"lora/{name.removesuffix('.weight')}"
        expected = base.read(name)
        if f"{module}.lora_A.weight" in adapter:
            expected = expected + 2 * adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
        assert torch.allclose(found.read(name), expected, rtol=1e-5, atol=1e-6), name
    assert sum("local_experts" in name for name in adapter) == 2 * 8 * 4 * 4  # layers, experts, factors, states


def grouped(folder: Path, values: dict[str, torch.Tensor], args: object) -> Path:
    """Factors as upstream stores those of grouped experts: all in one tensor, transposed block after block."""
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    blocks: dict[str, dict[int, torch.Tensor]] = {}
    pattern = re.compile(r"(.*\.mlp\.experts\.)local_experts\.(\d+)\.linear_fc(\d)\.lora_([AB])\.weight")
    for name, value in values.items():
        if match := pattern.fullmatch(name):
            key = f"{match[1]}weight{match[3]}_lora_{match[4].lower()}"
            blocks.setdefault(key, {})[int(match[2])] = value.t().contiguous()
        else:
            state[re.sub(r"\.(lora_[AB])\.", r".\1.default.", name)] = value
    for key, parts in blocks.items():
        rows, columns = parts[0].shape
        joined = torch.cat([parts[expert].flatten() for expert in range(len(parts))])
        state[key] = joined.view(rows, -1) if "weight1" in key else joined.view(-1, columns)
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    write_torch_file(path, {"args": args, "iteration": 1, "model": state})
    return folder


@pytest.mark.distributed
def test_upstreams_grouped_adapters_are_trained_on_like_separate_ones(whole: Path, tmp_path: Path) -> None:
    first = whole / "iter_0000003"
    factors = {name.removeprefix("lora/"): v for name, v in weights(first).items() if name.startswith("lora/")}
    folder = grouped(tmp_path / "grouped", factors, MegatronCheckpoint(first).first["args"])
    run(1, *argv(tmp_path / "separate", "--lora-load", first, "--finetune"))
    run(2, *argv(tmp_path / "joined", "--lora-load", folder, "--finetune", EP, 2))
    assert losses(tmp_path / "joined") == pytest.approx(losses(tmp_path / "separate"), rel=1e-5)
    assert losses(tmp_path / "joined") != pytest.approx(losses(whole), rel=1e-3)


REFUSED = {
    "experts with TP but not SP": (2, (TP, 2), ["--tensor-model-parallel-size 2", "--sequence-parallel"]),
    "experts that do not divide": (3, (EP, 3), ["8 experts", "3"]),
    "ETP above TP": (2, (ETP, 2), ["expert tensor parallel size 2", "1"]),
    "a length that CP cannot cut": (2, (CP, 2, "--seq-length", 62), ["62", "4"]),
    "a target it has not": (1, ("--lora-target-modules", "linear_kv_up_proj"), ["linear_kv_up_proj", "linear_qkv"]),
    "balancing nothing": (
        1,
        ("--moe-aux-loss-coeff", 0.1, "--moe-router-load-balancing-type", "none"),
        ["0.1", "none"],
    ),
    "another number of experts": (1, ("--num-experts", 4), ["4", "8"]),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    size, more, patterns = REFUSED[name]
    words = argv(tmp_path / "run", *more)
    if "--seq-length" in more:
        words.remove("--no-pad-to-seq-lengths")
    refused(launch(size, "posttrain_gpt.py", words), 2, *patterns)
    assert not (tmp_path / "run").exists()


DENSE = {
    "balance": (1, ("--moe-aux-loss-coeff", 0.1), ["--moe-aux-loss-coeff", "no experts"]),
    "expert parallelism": (2, (EP, 2), ["expert parallel size 2", "no experts"]),
    "expert tensor parallelism": (2, (TP, 2, ETP, 1), ["--expert-tensor-parallel-size 1", "no experts"]),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", DENSE)
def test_what_a_dense_model_cannot_be_trained_with_is_refused(name: str, tmp_path: Path) -> None:
    size, more, patterns = DENSE[name]
    refused(launch(size, "posttrain_gpt.py", training(tmp_path / "run", *more)), 2, *patterns)
    assert not (tmp_path / "run").exists()


def test_context_parallelism_of_an_answering_model_is_refused() -> None:
    words = ["--load", hf_model(), CP, 2, "--prompt", "the cat"]
    refused(launch(1, "inference.py", words), 2, "--context-parallel-size 2", "training only")
