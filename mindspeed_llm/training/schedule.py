"""Learning rate and weight decay per step, by megatron-core's scheduler."""

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mindspeed_llm.arguments.optimizer import OptimizerOptions
from mindspeed_llm.errors import UsageError


class Schedule:
    """Sets the rate a step is trained with: warm-up from 0 to `lr`, then decay to `min_lr`.

    Of W warm-up steps, step n (1-based) has the rate n/W that upstream prints for it; the first step behind them has
    the full rate. (Upstream trains step n with the rate of n - 1, so its first step has rate 0 and changes nothing.)
    """

    def __init__(self, optimizer: Any, options: OptimizerOptions, train_iters: int) -> None:
        decay = options.lr_decay_iters or train_iters
        fraction = options.lr_warmup_fraction
        warmup = options.lr_warmup_iters if fraction is None else int(fraction * decay)
        if warmup >= decay:
            raise UsageError(
                f"warm-up of {warmup} steps leaves nothing of the {decay} steps to decay over; shorten "
                "--lr-warmup-iters / --lr-warmup-fraction or train longer"
            )
        self.warmup = warmup
        self.scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=options.lr,
            min_lr=options.min_lr,
            lr_warmup_steps=warmup,
            lr_decay_steps=decay,
            lr_decay_style=options.lr_decay_style,
            start_wd=options.weight_decay,
            end_wd=options.weight_decay,
            wd_incr_steps=train_iters,
            wd_incr_style="constant",
        )

    def set(self, step: int) -> float:
        """Give the optimizer the rate and decay of `step` (1-based); -> the rate."""
        self.scheduler.num_steps = step if step <= self.warmup else step - 1
        self.scheduler.step(increment=0)
        return float(self.scheduler.get_lr({}))
