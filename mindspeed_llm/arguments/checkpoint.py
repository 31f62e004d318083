"""Where weights come from and go to."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError


@dataclass
class LoadOptions:
    """Checkpoint."""

    load: str | None = option(
        None, help="Model to start from: a Megatron checkpoint of any layout (torch or torch_dist), or an HF folder."
    )
    exit_on_missing_checkpoint: bool = option(
        True, help="A --load without a checkpoint is always an error here; kept for upstream's scripts."
    )
    no_load_optim: bool = option(False, help="Do not take the optimizer's state from the checkpoint.")
    no_load_rng: bool = option(False, help="Do not take the random state from the checkpoint.")

    def check(self) -> None:
        """Raise UsageError where upstream's default, a random start, is asked for."""
        if not self.exit_on_missing_checkpoint:
            raise UsageError("--exit-on-missing-checkpoint false: a random start is never made; correct --load instead")


@dataclass
class CheckpointOptions(LoadOptions):
    """Checkpoints."""

    save: str | None = option(None, help="Folder for the run's checkpoints.")
    save_interval: int | None = option(None, help="Steps between checkpoints; left out, one at the end.", unit="steps")
    no_save_optim: bool = option(False, help="Leave the optimizer's state out: smaller, but cannot be resumed.")
    no_save_rng: bool = option(False, help="Leave the random state out.")
    save_safetensors: bool = option(
        False,
        help="Write each checkpoint also for transformers, in its subfolder hf (full tuning, or --lora-ckpt-filter "
        "false: merged), and for peft, in peft (LoRA).",
    )
    max_shard_size: str = option("5GB", help="Largest file of weights that --save-safetensors writes: 500MB, 5GB.")
    auto_resume: bool = option(
        False, help="Continue from the newest complete checkpoint under --save, if any; wins over --load, --finetune."
    )
    overwrite: bool = option(False, help="Allow a --save folder that already holds something.")
    ckpt_format: str = option(
        "torch",
        help="Format of saved checkpoints: torch (one file per rank, as upstream's) or torch_dist (megatron-core's "
        "names and files). Either continues at any layout.",
        choices=("torch", "torch_dist"),
    )
    async_save: bool = option(
        False,
        help="Copy a checkpoint to memory and write it, with what --save-safetensors adds, while training goes on; the "
        "next one waits for it.",
    )
    save_total_limit: int | None = option(
        None,
        help="Checkpoints that stay in --save: the newest ones; the last and the best by validation loss always stay.",
        unit="checkpoints",
    )
    save_best: bool = option(False, help="Save also after each validation that lowers the validation loss.")
    early_stopping_patience: int | None = option(
        None,
        help="Stop after this many validations in a row without a lower loss; implies --save-best.",
        unit="validations",
    )
    early_stopping_threshold: float = option(
        0.0, help="By how much a validation loss must be lower to count.", unit="nats per token"
    )
    add_version: bool = option(
        False,
        help="Save into a new folder vN-<YYYYmmdd-HHMMSS> below --save; with --auto-resume into the newest that has a "
        "checkpoint.",
    )

    @property
    def saves_best(self) -> bool:
        """Whether a validation that lowers the loss is followed by a checkpoint."""
        return self.save_best or self.early_stopping_patience is not None

    def check(self) -> None:
        """Raise UsageError for counts below one and for options that contradict each other."""
        super().check()
        for name in ("save_interval", "save_total_limit", "early_stopping_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if not self.early_stopping_threshold >= 0:
            raise UsageError(f"--early-stopping-threshold {self.early_stopping_threshold:g}: must not be negative")
        if self.auto_resume and self.overwrite:
            raise UsageError("--auto-resume continues what is in --save and --overwrite discards it; give one")
        if self.auto_resume and self.save is None:
            raise UsageError("--auto-resume needs --save, the folder to continue from")
