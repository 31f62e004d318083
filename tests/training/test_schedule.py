"""Learning rates against closed forms, and how long a run is."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from mindspeed_llm import device
from mindspeed_llm.arguments.optimizer import OptimizerOptions
from mindspeed_llm.errors import UsageError

device.select("cpu")  # before megatron-core is imported, as the programs do it
from mindspeed_llm.training.schedule import Schedule  # noqa: E402


@pytest.fixture(scope="module")
def schedule() -> Callable[..., list[float]]:
    """Rates of steps 1..n under given options."""

    def rates(steps: int, **options: object) -> list[float]:
        groups = [
            {"lr": 0.0, "weight_decay": 0.0, "max_lr": options.get("lr", 0.01), "min_lr": options.get("min_lr", 0)}
        ]
        made = Schedule(SimpleNamespace(param_groups=groups), OptimizerOptions(**{"lr": 0.01, **options}), steps)
        return [made.set(step) for step in range(1, steps + 1)]

    return rates


def cosine(done: int, decay: int, high: float, low: float) -> float:
    return low + (high - low) * (1 + math.cos(math.pi * min(done / decay, 1))) / 2


@pytest.mark.parametrize("warmup", [0, 3])
def test_cosine_rises_to_the_full_rate_and_falls_to_the_least(schedule: Callable, warmup: int) -> None:
    wanted = [
        0.01 * n / warmup if n <= warmup else cosine(n - 1 - warmup, 20 - warmup, 0.01, 0.001) for n in range(1, 21)
    ]
    assert schedule(20, min_lr=0.001, lr_warmup_iters=warmup) == pytest.approx(wanted, rel=1e-12)


def test_linear_falls_by_equal_steps_and_stays_at_the_least_behind_the_decay(schedule: Callable) -> None:
    wanted = [0.01 - 0.009 * min(n - 1, 10) / 10 for n in range(1, 16)]
    assert schedule(15, min_lr=0.001, lr_decay_style="linear", lr_decay_iters=10) == pytest.approx(wanted, rel=1e-12)


def test_constant_stays_and_a_fraction_warms_up(schedule: Callable) -> None:
    wanted = [0.01 * min(n / 2, 1) for n in range(1, 11)]
    assert schedule(10, lr_decay_style="constant", lr_warmup_fraction=0.2) == pytest.approx(wanted)


def test_the_first_step_trains_at_a_rate_above_zero(schedule: Callable) -> None:
    assert schedule(100, lr_warmup_fraction=0.01)[0] == pytest.approx(0.01)
    assert schedule(100, lr_warmup_fraction=0.1)[0] == pytest.approx(0.001)


@pytest.mark.parametrize("options", [{"lr_warmup_iters": 10}, {"lr_warmup_fraction": 1.0}, {"lr_warmup_iters": 99}])
def test_a_warm_up_as_long_as_the_decay_is_refused(schedule: Callable, options: dict) -> None:
    with pytest.raises(UsageError, match="warm-up of .* leaves nothing of the 10 steps"):
        schedule(10, **options)
