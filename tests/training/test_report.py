"""What a run tells its user: the log line to the byte, the history, the picture, and numbers that went wrong."""

import json
import math
import re
import struct
from pathlib import Path

import pytest

from mindspeed_llm.training.report import StepRecord, duration, log_line
from tests.fixtures import VOCABULARY, data, done, hf_model, launch, losses, make_hf, records, training

# the line upstream prints, field by field; what stands behind it is ours
LINE = re.compile(
    r"^ \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration [ \d]{7}\d/[ \d]{7}\d \| consumed samples: [ \d]{11}\d \|"
    r" elapsed time per iteration \(ms\): \d+\.\d \|( throughput per GPU \(TFLOP/s/GPU\): \d+\.\d \|)?"
    r" learning rate: \d\.\d{6}E[+-]\d\d \| global batch size: [ \d]{4}\d \| lm loss: (\d\.\d{6}E[+-]\d\d|NAN) \|"
    r" loss scale: 1\.0 \| grad norm: (\d+\.\d{3}|nan|inf) \| number of skipped iterations: [ \d]{2}\d \|"
    r" number of nan iterations: [ \d]{2}\d \|"
)


def run(save: Path, *more: object, pictures: bool = False) -> str:
    return done(launch(1, "posttrain_gpt.py", training(save, *more), pictures=pictures)).out


def logged(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(" [") and "iteration" in line]


def test_a_record_is_written_as_upstream_writes_it_to_the_byte() -> None:
    record = StepRecord(1, 16, 1234.5, 6.25e-7, 1.234567, 0.123, 1000.4, 512.2, 0, 0)
    line = log_line(record, 2000, 16, 0.0, None)
    stamp, rest = line[:22], line[22:]
    assert re.match(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\]", stamp)
    assert rest.startswith(
        " iteration        1/    2000 | consumed samples:           16 | elapsed time per iteration (ms): 1234.5 |"
        " learning rate: 6.250000E-07 | global batch size:    16 | lm loss: 1.234567E+00 | loss scale: 1.0 |"
        " grad norm: 0.123 | number of skipped iterations:   0 | number of nan iterations:   0 |"
    )
    assert rest.endswith(" tokens/s: 1000 | memory (MB): 512 | time left: 0:41:08 |")
    assert " throughput per GPU (TFLOP/s/GPU): 7.2 | learning rate" in log_line(record, 2000, 16, 0.0, 7.21)


def test_a_loss_of_zero_or_nan_is_printed_too() -> None:
    for loss, text in ((0.0, "lm loss: 0.000000E+00 |"), (math.nan, "lm loss: NAN |")):
        line = log_line(StepRecord(3, 4, 1.0, 1e-5, loss, math.nan, 1, 1, 2, 1), 9, 4, 0.0, None)
        assert LINE.match(line) and text in line and "skipped iterations:   2 | number of nan iterations:   1 |" in line


def test_durations_are_hours_minutes_and_seconds() -> None:
    wanted = {-1: "0:00:00", 0.4: "0:00:00", 59.6: "0:01:00", 3661: "1:01:01", 90000: "25:00:00"}
    assert {seconds: duration(seconds) for seconds in wanted} == wanted


def test_a_run_prints_one_line_a_step_and_keeps_the_same_numbers(tmp_path: Path) -> None:
    out = run(tmp_path / "run", "--tensorboard-dir", tmp_path / "board", "--log-throughput", "--split", "80,20,0",
              "--eval-interval", 2, pictures=True)  # fmt: skip
    lines, history = logged(out), records(tmp_path / "run")
    assert len(lines) == len(history) == 6 and all(LINE.match(line) for line in lines), lines
    for step, (line, record) in enumerate(zip(lines, history, strict=True), 1):
        assert record["iteration"] == step and record["consumed_samples"] == 4 * step
        assert f"lm loss: {record['loss']:.6E} |" in line and f"learning rate: {record['learning_rate']:.6E}" in line
        assert record["tokens_per_second"] > 0 and record["memory"] > 0
    assert out.count("memory (MB) | allocated:") == 1
    validation = re.findall(r"validation loss at iteration (\d) \| lm loss value: (\S+) \| lm loss PPL: (\S+) \|", out)
    assert [int(step) for step, _, _ in validation] == [2, 4, 6]
    assert all(float(ppl) == pytest.approx(math.exp(float(loss)), rel=1e-5) for _, loss, ppl in validation)
    picture = tmp_path / "run_logs" / "run" / "loss.png"
    assert f"loss curve: {picture}" in out
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", content[16:24]) == (880, 550)
    from matplotlib.image import imread

    assert len({tuple(pixel) for row in imread(picture)[::5, ::5] for pixel in row.tolist()}) > 10
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [e.value for e in board.Scalars("lm loss")] == pytest.approx([r["loss"] for r in history])
    assert [e.step for e in board.Scalars("lm loss validation")] == [2, 4, 6]


def test_lines_come_every_log_interval_and_at_the_end_with_the_mean_loss(tmp_path: Path) -> None:
    out = run(tmp_path / "some", "--log-interval", 4)
    each, some = losses(tmp_path / "some"), logged(out)
    assert len(each) == 6  # the history has every step
    assert [re.findall(r"iteration +(\d+)/|samples: +(\d+) \|", line) for line in some] == [
        [("4", ""), ("", "16")], [("6", ""), ("", "24")]]  # fmt: skip
    for line, part in zip(some, (each[:4], each[4:]), strict=True):
        assert f"lm loss: {sum(part) / len(part):.6E} |" in line


def broken_model(folder: Path, token: int) -> Path:
    """The tiny model with one token's embedding not a number: only rows with that token go wrong."""
    import torch
    from safetensors.torch import load_file, save_file

    make_hf(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_step_with_a_nan_is_printed_counted_skipped_and_changes_nothing(tmp_path: Path) -> None:
    import numpy as np

    from mindspeed_llm.data.dataset import IndexedDataset
    from mindspeed_llm.data.sampler import EpochSampler

    rows = IndexedDataset(data())
    steps = [[n for micro in EpochSampler(len(rows), 2, 0, 1, 2, 1234).batch(4 * s) for n in micro] for s in range(6)]
    seen = [set(np.concatenate([rows[n]["input_ids"][:64] for n in step]).tolist()) for step in steps]
    token = next(t for t in sorted(seen[3]) if not any(t in other for k, other in enumerate(seen) if k != 3))
    assert token < VOCABULARY
    out = run(tmp_path / "run", "--load", broken_model(tmp_path / "hf", token), "--save-interval", 3)
    lines = logged(out)
    assert all(LINE.match(line) for line in lines) and "lm loss: NAN |" in lines[3]
    counts = re.findall(r"skipped iterations: +(\d+) \| number of nan iterations: +(\d+) \|", out)
    assert counts == [("0", "0")] * 3 + [("1", "1")] * 3
    run(tmp_path / "good", "--save-interval", 3)
    assert losses(tmp_path / "run")[:3] == losses(tmp_path / "good")[:3] and losses(tmp_path / "run")[3] is None
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run")[4:])
    # counted across a resumption too
    again = training(tmp_path / "run", "--load", tmp_path / "hf", "--lora-load", tmp_path / "run", steps=8)
    assert "skipped iterations:   1 | number of nan iterations:   1" in done(launch(1, "posttrain_gpt.py", again)).out
    history = (tmp_path / "run_logs" / "run" / "logging.jsonl").read_text()
    assert [json.loads(line)["nan"] for line in history.splitlines()] == [0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.distributed
def test_the_start_and_the_end_are_told_once_over_all_processes(tmp_path: Path) -> None:
    argv = training(tmp_path / "run", "--tensor-model-parallel-size", 2)
    both = [o.out for o in launch(2, "posttrain_gpt.py", argv, pictures=True)]
    for text, where in (("trainable parameters", 0), ("saving checkpoint at iteration       6", 0), ("next: python", 0),
                        ("loss curve", 1), ("lm loss", 1)):  # fmt: skip
        assert text in both[where] and text not in both[1 - where], text
    assert f"TP2 PP1 DP1 on 2 processes; base {hf_model()}" in both[0]
    assert f"  successfully saved checkpoint from iteration       6 to {tmp_path / 'run'}: " in both[0]
