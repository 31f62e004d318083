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
    ckpt_format: str = option("torch", help="Format of saved checkpoints: one file per rank.", choices=("torch",))

    def check(self) -> None:
        """Raise UsageError for an interval below one step and for resuming and overwriting at once."""
        super().check()
        if self.save_interval is not None and self.save_interval < 1:
            raise UsageError(f"--save-interval {self.save_interval}: must be at least 1")
        if self.auto_resume and self.overwrite:
            raise UsageError("--auto-resume continues what is in --save and --overwrite discards it; give one")
        if self.auto_resume and self.save is None:
            raise UsageError("--auto-resume needs --save, the folder to continue from")
