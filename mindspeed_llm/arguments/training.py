"""How long and in which precision is trained."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError


@dataclass
class TrainingOptions:
    """Training."""

    stage: str = option(
        "sft",
        help="What is learnt: answers (sft, supervised fine-tuning), or which of two answers is preferred (dpo, direct "
        "preference optimization; its reference is the base without the adapter).",
        choices=("sft", "dpo"),
    )
    micro_batch_size: int = option(1, help="Rows, or pairs, per forward pass of one process.", unit="rows")
    global_batch_size: int | None = option(
        None,
        help="Rows per optimizer step over all processes; left out, micro batch size times data-parallel size.",
        unit="rows",
    )
    train_iters: int | None = option(None, help="Optimizer steps to train; give this or --epochs.", unit="steps")
    epochs: int | None = option(None, help="Passes over the training rows, instead of --train-iters.", unit="epochs")
    seed: int = option(1234, help="Seed of shuffling, adapter initialisation and sampling (Megatron's default).")
    bf16: bool = option(
        False, help="Compute in bfloat16 with float32 master weights and optimizer state; left out, all float32."
    )
    fp32: bool = option(False, help="Compute in float32 (said explicitly; it is also what happens without --bf16).")
    finetune: bool = option(
        False, help="Start at step 0 from the loaded weights: iteration, optimizer and random state are not taken."
    )
    calculate_per_token_loss: bool = option(
        False, help="Weigh every trained token of the global batch alike; left out, every micro-batch counts alike."
    )
    recompute_granularity: str | None = option(
        None,
        help="Recompute activations in the backward pass: full (whole layers) or selective (attention only).",
        choices=("full", "selective"),
    )
    recompute_method: str | None = option(
        None,
        help="Which layers full recomputation covers: all in groups (uniform) or the first of each stage (block).",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int | None = option(
        None, help="Layers per group (uniform) or layers recomputed per stage (block).", unit="layers"
    )
    eval_interval: int = option(1000, help="Steps between validations (Megatron's default).", unit="steps")
    eval_iters: int | None = option(
        None,
        help="Global batches per validation, from the first; left out, all validation rows; 0 turns it off.",
        unit="batches",
    )

    @property
    def dtype_name(self) -> str:
        """Compute type of the run, as torch names it: "bfloat16" with --bf16, else "float32"."""
        return "bfloat16" if self.bf16 else "float32"

    def check(self) -> None:
        """Raise UsageError for sizes below one and options that contradict each other."""
        if self.bf16 and self.fp32:
            raise UsageError("--bf16 and --fp32 contradict each other; give one of the two")
        if self.train_iters is not None and self.epochs is not None:
            raise UsageError(f"--train-iters {self.train_iters} and --epochs {self.epochs} both set the length")
        if self.eval_iters is not None and self.eval_iters < 0:
            raise UsageError(f"--eval-iters {self.eval_iters}: must not be negative")
        for name in (
            "micro_batch_size",
            "global_batch_size",
            "train_iters",
            "epochs",
            "recompute_num_layers",
            "eval_interval",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.recompute_granularity == "full" and self.recompute_method is None:
            raise UsageError("--recompute-granularity full needs --recompute-method uniform or block")
        if self.recompute_granularity != "full" and self.recompute_method is not None:
            raise UsageError(f"--recompute-method {self.recompute_method} needs --recompute-granularity full")
