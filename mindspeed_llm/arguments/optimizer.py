"""How weights are updated."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError


@dataclass
class OptimizerOptions:
    """Optimizer and learning-rate schedule."""

    lr: float = option(1.25e-5, help="Highest learning rate (upstream's recipes for Qwen3).")
    min_lr: float = option(0.0, help="Learning rate at the end of the decay.")
    lr_decay_style: str = option(
        "cosine", help="Shape of the decay from --lr to --min-lr.", choices=("cosine", "linear", "constant")
    )
    lr_warmup_fraction: float | None = option(
        None, help="Share of the decay steps during which the rate rises linearly from 0; or give --lr-warmup-iters."
    )
    lr_warmup_iters: int = option(0, help="Steps of linear warm-up.", unit="steps")
    lr_decay_iters: int | None = option(
        None, help="Steps after which --min-lr is reached; left out, the length of the training.", unit="steps"
    )
    weight_decay: float = option(0.01, help="Decoupled weight decay of AdamW.")
    adam_beta1: float = option(0.9, help="Decay of the first moment.")
    adam_beta2: float = option(0.999, help="Decay of the second moment.")
    adam_eps: float = option(1e-8, help="Number added to the root of the second moment.")
    clip_grad: float = option(1.0, help="Largest norm of the whole gradient; 0 turns clipping off.")

    def check(self) -> None:
        """Raise UsageError for rates outside their range and two warm-ups at once."""
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            raise UsageError(
                f"--lr-warmup-fraction {self.lr_warmup_fraction} and --lr-warmup-iters {self.lr_warmup_iters} "
                "both set the warm-up; give one"
            )
        if not 0 <= self.min_lr <= self.lr:
            raise UsageError(f"--min-lr {self.min_lr} must lie between 0 and --lr {self.lr}")
        if self.lr_warmup_fraction is not None and not 0 <= self.lr_warmup_fraction < 1:
            raise UsageError(f"--lr-warmup-fraction {self.lr_warmup_fraction} must be at least 0 and below 1")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 0 and below 1")
        for name in ("weight_decay", "clip_grad", "adam_eps"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} must not be negative")
