"""What a run judges by: spikes, the rows behind them, wasted hardware, FLOPs by hand, curves that keep their peaks."""

import math
from typing import Any

import numpy
import pytest

from mindspeed_llm.arguments.logging import LoggingOptions
from mindspeed_llm.errors import UsageError
from mindspeed_llm.training import charts
from mindspeed_llm.training.advice import bubble, padding_advice, pipeline_advice
from mindspeed_llm.training.flops import visible
from mindspeed_llm.training.report import StepRecord, averaged
from mindspeed_llm.training.report_page import Story, page
from mindspeed_llm.training.trackers import open_trackers, tell
from tests.distributed.pool import pool


def test_a_spike_is_told_once_and_noise_and_a_new_level_are_not() -> None:
    found = pool(1).run("tests.training.oddities_worker:spikes")[0]
    level = found.pop("level")
    assert level == list(range(30, 30 + len(level))) and 5 < len(level) < 26
    assert found == {
        "noise": [], "spike": [30], "two spikes": [30, 31], "flat": [30], "off": [], "early": [], "with nan": [30],
    }  # fmt: skip


def test_the_rows_named_are_those_of_the_micro_batch_that_went_wrong() -> None:
    found = pool(1).run("tests.training.oddities_worker:rows")[0]
    # 2 rows a micro-batch, 2 replicas, 2 micro-batches: rows 0..7 are (m0 d0) (m0 d1) (m1 d0) (m1 d1)
    assert found["nan in m1 d0"] == ([14, 15], "rows of the micro-batches whose loss is not finite")
    assert found["nan in two"][0] == [12, 13, 14, 15]
    assert found["highest is m0 d1"] == ([12, 13], "rows of the micro-batch with the largest loss (9)")
    assert found["unknown"] == ([10, 11, 12, 13, 14, 15, 16, 17], "rows of the step")
    assert found["named"] == "0, 2 of a/b; 1 of c of d; what fills"
    assert found["many"].startswith("0, 1, 2,") and found["many"].endswith("15 and 4 more of a/b")


@pytest.mark.parametrize(
    ("stages", "virtual", "micro_batches", "micro", "replicas", "says"),
    [
        # upstream's tune_qwen3_8b_4K_lora_ptd.sh: 8 devices, PP2, 4 x 4 = 16 rows
        (2, 1, 1, 4, 4, ("wait 50%", "--micro-batch-size 1 makes it 20%", "--global-batch-size 64 keeps it at 20%")),
        (4, 1, 2, 2, 1, ("share 2 micro-batches", "wait 60%", "--micro-batch-size 1 makes it 43%", "size 24 ")),
        (2, 1, 1, 1, 1, ("wait 50% of the time; --global-batch-size 4 keeps",)),
        (4, 2, 4, 1, 1, ("wait 27%", "--global-batch-size 8 keeps it at 16%")),
        (2, 1, 4, 1, 1, ()),
        (1, 1, 1, 1, 8, ()),
    ],
)
def test_a_pipeline_that_waits_gets_better_batch_sizes(
    stages: int, virtual: int, micro_batches: int, micro: int, replicas: int, says: tuple[str, ...]
) -> None:
    lines = pipeline_advice(stages, virtual, micro_batches, micro, replicas)
    assert len(lines) == bool(says) and all(one in lines[0] for one in says), lines


def test_the_bubble_is_what_a_schedule_drawn_step_by_step_has() -> None:
    for stages, number in ((2, 1), (2, 4), (4, 3), (3, 8)):
        # forward of micro-batch m begins on stage s when that stage and the one before it are free; backward mirrored
        ends = [[0] * (number + 1) for _ in range(stages + 1)]
        for s in range(1, stages + 1):
            for m in range(1, number + 1):
                ends[s][m] = max(ends[s - 1][m], ends[s][m - 1]) + 1
        whole = ends[stages][number]
        assert bubble(stages, 1, number) == pytest.approx(1 - number / whole)


def test_padding_is_told_when_it_is_most_of_the_work() -> None:
    (line,) = padding_advice(numpy.array([10, 20, 9000]), 4096)
    assert "1375 tokens on average" in line and "66% of the work is padding" in line
    assert padding_advice(numpy.array([3000, 9000]), 4096) == []


def test_visible_pairs_are_those_of_a_mask_drawn_out() -> None:
    for length in (1, 5, 8):
        for window in (None, 1, 3, 8, 20):
            q, k = numpy.mgrid[:length, :length]
            mask = (k <= q) & (k > q - (window or length))
            assert visible(length, window) == mask.sum()


def record(step: int, **more: Any) -> StepRecord:
    usual = {"iteration": step, "consumed_samples": 4 * step, "milliseconds": 100.0, "learning_rate": 1e-4,
             "loss": 2.0, "grad_norm": 1.0, "tokens_per_second": 1000.0, "memory": 10.0, "skipped": 0, "nan": 0,
             "tokens": 100, "trained_tokens": 40, "teraflops": 2.0}  # fmt: skip
    return StepRecord(**{**usual, **more})


def test_steps_between_lines_are_averaged_over_their_time() -> None:
    steps = [
        record(1, milliseconds=100.0, tokens=100, teraflops=1.0, ceiling=0.1, loss=1.0),
        record(2, milliseconds=300.0, tokens=500, teraflops=3.0, ceiling=0.3, loss=math.nan),
        record(3, milliseconds=200.0, tokens=0, teraflops=2.0, ceiling=0.2, loss=3.0),
    ]
    mean = averaged(steps)
    assert (mean.iteration, mean.loss, mean.milliseconds) == (3, 2.0, 200.0)
    assert mean.tokens_per_second == pytest.approx(600 / 0.6)
    assert mean.teraflops == pytest.approx((0.1 * 1 + 0.3 * 3 + 0.2 * 2) / 0.6)
    assert mean.ceiling == pytest.approx(mean.teraflops / 10)


def test_a_thinned_curve_keeps_its_peaks_and_its_order() -> None:
    points = [(float(n), math.sin(n / 50)) for n in range(10_000)]
    points[4321] = (4321.0, 99.0)
    kept = charts.thinned(points)
    assert len(kept) <= charts.POINTS + 2 and (4321.0, 99.0) in kept and kept == sorted(kept)
    assert min(y for _, y in kept) == min(y for _, y in points)
    assert charts.ticks(0.0, 1.0) == [0, 0.5, 1] and charts.ticks(3.0, 3.0) == [3.0]
    assert charts.ticks(0.0, 2000.0, 8) == [0, 500, 1000, 1500, 2000]


def test_the_page_stands_alone_and_escapes_what_it_shows() -> None:
    records = [record(n, loss=3 - n / 10).to_json() for n in range(1, 9)]
    records[3]["loss"] = None
    data = {"data/<x>": None, "data/y_train": {"rows": 1234}}
    story = Story("run", ["LoRA <b>"], {"--lr": 0.1}, data, 4.0, ["step 4: the loss is nan; rows: 3 of a&b"], [4])
    text = page(records, [(4, 2.5), (8, 2.2)], story, 20)
    for wanted in (
        "of 20 steps done",
        "2.2000",
        "50%",
        "rows: 3 of a&amp;b",
        "LoRA &lt;b&gt;",
        "data/&lt;x&gt;",
        "--lr",
    ):
        assert wanted in text, wanted
    assert text.count("<svg") == len(charts.CHARTS) and text.count("class=bad") == len(charts.CHARTS)
    assert not any(one in text for one in ("http:", "https:", "src=", "<script", "<b> "))
    assert text.count("<circle class=c1") == 2  # two validations


class Fake:
    """Stands in for the package of a service."""

    def __init__(self, fails: bool = False) -> None:
        self.said: list[Any] = []
        self.fails = fails

    def init(self, **settings: Any) -> None:
        self.said.append(settings)

    def log(self, values: dict[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("no route\nto host")
        self.said.append((step, values))

    def finish(self) -> None:
        self.said.append("end")


def test_services_get_the_numbers_and_a_missing_or_failing_one_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from mindspeed_llm.training import trackers

    modules = {"wandb": Fake(), "swanlab": Fake(fails=True)}
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "tensorboard" else name)
    monkeypatch.setattr(trackers, "import_module", lambda name: modules[name])
    told: list[str] = []
    options = LoggingOptions(report_to=["wandb", "swanlab"], tensorboard_dir=str(tmp_path), report_project="mine")
    found = open_trackers(options, "run", tmp_path, {"--lr": 0.1}, told.append)
    assert told == [
        "--tensorboard-dir: tensorboard is not installed (pip install tensorboard); the run is not reported there"
    ]
    tell(found, 3, {"loss": 1.5, "grad_norm": None, "memory": 7, "teraflops": math.inf}, told.append)
    tell(found, 4, {"loss": 1.25}, told.append)
    for one in found:
        one.close()
    assert modules["wandb"].said == [
        {"project": "mine", "config": {"--lr": 0.1}, "name": "run"},
        (3, {"lm loss": 1.5, "memory-megabytes": 7.0}), (4, {"lm loss": 1.25}), "end"]  # fmt: skip
    assert modules["swanlab"].said[0]["experiment_name"] == "run" and len(modules["swanlab"].said) == 1
    assert len(told) == 2 and "step 3 (ConnectionError: no route)" in told[1]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"profile_steps": [5, 4]}, "--profile-steps 5 4"),
        ({"profile_steps": [0, 4]}, "--profile-steps 0 4"),
        ({"max_bad_steps": -1}, "--max-bad-steps -1"),
        ({"spike_threshold": -2.0}, "--spike-threshold -2.0"),
        ({"report_to": ["none", "wandb"]}, "--report-to none wandb"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        LoggingOptions(**options).check()
