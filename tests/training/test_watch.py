"""Short real runs watched: rows of bad steps named, runs ended, FLOPs as counted, traces, checks that notice faults."""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures import data, done, hf_model, launch, losses, make_hf, records, refused, training
from tests.training import faults
from tests.training.test_experts import moe_model

WHOLE = ("--pad-to-multiple-of", 64)  # every row is padded to --seq-length
SHORT = ("--lr-warmup-iters", 0)


def folder(tmp_path: Path) -> Path:
    return tmp_path / "run_logs" / "run"


@pytest.mark.parametrize(
    ("lora", "more"),
    [(True, ()), (True, ("--recompute-granularity", "full", "--recompute-method", "uniform",
                         "--recompute-num-layers", 1)), (False, ()),
     (True, ("--lora-target-modules", "linear_fc2")), (True, (moe_model, "--moe-aux-loss-coeff", 0.0))],
    ids=["lora", "recompute", "full", "fc2", "experts"],
)  # fmt: skip
def test_the_flops_told_are_those_torchs_own_counter_sees(lora: bool, more: tuple[Any, ...], tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    around = functools.partial(faults.counted_flops, str(counts))
    more = tuple(word for one in more for word in (("--load", one()) if callable(one) else (one,)))
    argv = training(tmp_path / "run", *WHOLE, *SHORT, *more, lora=lora, steps=1)
    done(launch(1, "posttrain_gpt.py", argv, around=around))
    counted = json.loads(counts.read_text())
    attention = {name: counted.pop(name) for name in list(counted) if "attention" in name}
    (step,) = records(tmp_path / "run")
    told = step["teraflops"] * 1e12 * step["milliseconds"] / 1000
    # torch counts the whole square of scores, of which a causal mask leaves (s + 1) / 2s, and five products backward,
    # one of which computes the scores again
    forward = sum(n for name, n in attention.items() if "backward" not in name)
    backward = sum(n for name, n in attention.items() if "backward" in name)
    assert forward > 0 and backward > 0
    expected = sum(counted.values()) + (forward + backward * 4 / 5) * 65 / 128
    assert told == pytest.approx(expected, rel=1e-9), (counted, attention)


def test_a_run_ends_after_too_many_bad_steps_with_the_rows_named(tmp_path: Path) -> None:
    from mindspeed_llm.data.sampler import EpochSampler

    around = functools.partial(faults.gradients_blow_up, (3, 5, 6))
    argv = training(tmp_path / "run", "--max-bad-steps", 2)
    (outcome,) = launch(1, "posttrain_gpt.py", argv, around=around)
    rows = EpochSampler(29, 2, 0, 1, 2, 1234)
    for step in (3, 5, 6):
        told = re.search(
            rf"warning: step {step}: the gradient norm is inf \(the loss is \d\.\d+\); the step is not applied; rows "
            rf"of the micro-batch with the largest loss \(\d\.\d+\): (\d+), (\d+) of {data()}\n",
            outcome.out,
        )
        assert told and [int(told[1]), int(told[2])] in rows.batch(4 * (step - 1)), outcome.out
    error = refused([outcome], 1, "--max-bad-steps 2: 2 steps in a row", "step 6: the gradient norm is inf")
    assert str(data()) in error
    # saved as of the last step that was applied, pictures and page made although the run ended with an error
    assert (tmp_path / "run" / "iter_0000006" / "mp_rank_00").is_dir()
    page = (folder(tmp_path) / "report.html").read_text()
    assert "the run ended with an error: --max-bad-steps 2" in page and page.count("class=bad") == 3 * 4
    assert [r["skipped"] for r in records(tmp_path / "run")] == [0, 0, 1, 1, 2, 3]


@pytest.mark.distributed
def test_rows_with_a_nan_are_named_from_whatever_replica_and_micro_batch_they_are_in(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from mindspeed_llm.data.dataset import IndexedDataset
    from mindspeed_llm.data.sampler import EpochSampler

    source = IndexedDataset(data())
    tokens = [set(source[n]["input_ids"][:64].tolist()) for n in range(len(source))]
    batch = EpochSampler(len(source), 8, 0, 1, 1, 1234).batch(0)[0]
    # a token that one row of the first step has, on the second replica
    position, token = next((k, t) for k in (2, 3, 6, 7) for t in sorted(tokens[batch[k]])
                           if not any(t in tokens[row] for row in batch if row != batch[k]))  # fmt: skip
    make_hf(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = math.nan
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    argv = training(tmp_path / "run", "--load", tmp_path / "hf", "--global-batch-size", 8, *SHORT, steps=1)
    out = done(launch(2, "posttrain_gpt.py", argv)).out
    pair = position // 2 * 2
    wanted = f"{batch[pair]}, {batch[pair + 1]} of {data()}"
    assert f"whose loss is not finite: {wanted}\n" in out, out
    assert losses(tmp_path / "run") == [None]


def test_what_was_asked_for_is_written_and_changes_nothing(tmp_path: Path) -> None:
    done(launch(1, "posttrain_gpt.py", training(tmp_path / "plain")))
    more = ("--profile-steps", 2, 3, "--measure-ceiling", "--debug-checks", "--report-to", "tensorboard", "wandb")
    out = done(launch(1, "posttrain_gpt.py", training(tmp_path / "run", *more), pictures=True)).out
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    trace = json.loads((folder(tmp_path) / "profile" / "rank_0.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if "name" in event]
    steps = sum(name.startswith("Optimizer.step") for name in names)
    assert steps == 2 and "aten::mm" in names, steps
    assert "warning: --report-to wandb: wandb is not installed (pip install wandb)" in out
    assert list((folder(tmp_path) / "tensorboard").glob("events*"))
    rate = re.search(r"measured ceiling in TFLOP/s per device: (\S+) at \d+ x (\d+) x (\d+); slowest", out)
    assert rate and {int(rate[2]), int(rate[3])} <= {24, 44, 60, 88, 100, 331}
    for one in records(tmp_path / "run"):
        assert one["ceiling"] == pytest.approx(one["teraflops"] / float(rate[1]), rel=1e-2)
        assert 0 <= one["waiting"] < one["milliseconds"] and one["trained_tokens"] < one["tokens"]
    assert "of the measured ceiling (%): " in out
    made = {path.name for path in folder(tmp_path).iterdir()}
    assert made == {"logging.jsonl", "report.html", "loss.png", "learning_rate.png", "grad_norm.png",
                    "throughput.png", "profile", "tensorboard"}  # fmt: skip
    page = (folder(tmp_path) / "report.html").read_text()
    assert str(data()) in page and "--debug-checks" in page and "wandb is not installed" in page


def test_trained_tokens_and_tokens_are_those_of_the_rows(tmp_path: Path) -> None:
    from mindspeed_llm.data.dataset import IndexedDataset
    from mindspeed_llm.data.sampler import EpochSampler

    done(launch(1, "posttrain_gpt.py", training(tmp_path / "run", "--split", "80,20,0", "--eval-interval", 3,
                                                "--no-shuffle", steps=3)))  # fmt: skip
    lines = [json.loads(one) for one in (folder(tmp_path) / "logging.jsonl").read_text().splitlines()]
    assert [("loss" in one, "validation_loss" in one) for one in lines] == [(True, False)] * 3 + [(False, True)]
    argv = training(tmp_path / "run", "--split", "80,20,0", "--no-shuffle", "--auto-resume", steps=4)
    done(launch(1, "posttrain_gpt.py", argv))
    again = [json.loads(one) for one in (folder(tmp_path) / "logging.jsonl").read_text().splitlines()]
    assert again[:4] == lines and again[4]["iteration"] == 4  # a resumed run continues the history, validations too
    source = IndexedDataset(data())
    everything = EpochSampler(len(source), 2, 0, 1, 2, 1234)
    done(launch(1, "posttrain_gpt.py", training(tmp_path / "all", "--seq-length", 256)))
    for step, one in enumerate(records(tmp_path / "all")):
        pairs = [[source[row] for row in micro] for micro in everything.batch(4 * step)]
        longest = [max(len(row["input_ids"]) for row in pair) for pair in pairs]
        assert one["tokens"] == sum(2 * math.ceil(length / 8) * 8 for length in longest)
        assert one["trained_tokens"] == sum(int(np.sum(row["labels"][1:] != -100)) for pair in pairs for row in pair)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("fault", "layout", "says"),
    [
        (faults.adapter_changed_on_rank_1, (), r"rank 0: data-parallel replicas differ in \S*linear_fc1.lora_B"),
        (faults.base_changed_on_rank_0, ("--tensor-model-parallel-size", 2),
         r"rank 0: the frozen base has changed in \S*linear_fc2.base_layer.weight"),
        (faults.other_rows_on_rank_1, ("--pipeline-model-parallel-size", 2), "read different rows"),
    ],
    ids=["replicas", "base", "rows"],
)  # fmt: skip
def test_debug_checks_notice_a_planted_fault(fault: Any, layout: tuple[Any, ...], says: str, tmp_path: Path) -> None:
    argv = training(tmp_path / "run", "--debug-checks", *layout, steps=3)
    found = launch(2, "posttrain_gpt.py", argv, around=fault)
    assert "rank 0" in refused(found, 1, rf"--debug-checks after step [12]: .*{says}")


@pytest.mark.distributed
def test_debug_checks_find_nothing_in_sound_runs_of_every_kind_of_replica(tmp_path: Path) -> None:
    sequence = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--lora-fusion")
    done(launch(2, "posttrain_gpt.py", training(tmp_path / "a", "--debug-checks", *sequence, *SHORT, steps=2)))
    overlap = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
    done(launch(2, "posttrain_gpt.py", training(tmp_path / "b", "--debug-checks", *overlap, steps=3)))
    plain = training(tmp_path / "c", *overlap, steps=3)
    done(launch(2, "posttrain_gpt.py", plain))
    assert losses(tmp_path / "b") == losses(tmp_path / "c")


def test_steps_to_profile_behind_the_end_are_refused(tmp_path: Path) -> None:
    argv = training(tmp_path / "run", "--load", hf_model(), "--profile-steps", 9, 12)
    refused(launch(1, "posttrain_gpt.py", argv), 2, "--profile-steps 9: the run has 6 steps")
