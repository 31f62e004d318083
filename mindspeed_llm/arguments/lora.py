"""How the model is adapted."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError

TARGET_MODULES = (
    "linear_qkv",
    "linear_proj",
    "linear_fc1",
    "linear_fc2",
    "linear_q_proj",
    "linear_q_down_proj",
    "linear_q_up_proj",
    "linear_kv_down_proj",
    "linear_kv_up_proj",
)


@dataclass
class LoraOptions:
    """LoRA."""

    lora_r: int | None = option(
        None, help="Rank of the adapters. A saved adapter knows its own; a contradicting value is refused."
    )
    lora_alpha: int | None = option(
        None, help="Scale of the adapters: alpha / r multiplies their output (usual: alpha = 2 r)."
    )
    lora_target_modules: list[str] | None = option(
        None, help="Layers that get an adapter; giving any turns LoRA on.", choices=TARGET_MODULES
    )
    lora_load: str | None = option(
        None,
        help="Saved adapter, or PEFT folder, to continue from (with --load for the base); with --finetune from step 0.",
    )
    lora_fusion: bool = option(
        False, help="Compute base layer and adapter in one step with overlapped communication (CCLoRA); same numbers."
    )
    use_fused_mlp: bool = option(
        False,
        help="With --lora-fusion, compute a whole SwiGLU MLP in one step where both its layers have adapters: same "
        "numbers, less memory, more overlap. Changes nothing without --lora-fusion.",
    )
    lora_ckpt_filter: bool = option(
        True, help="Save only the adapter and its optimizer state; false saves the frozen base weights too."
    )
    lora_dropout: float | None = option(
        None, help="Dropout on the adapters' input while training; left out, a saved adapter's own, else 0."
    )

    def check(self) -> None:
        """Raise UsageError for a rank below one, a scale of zero and a dropout that is no probability."""
        if self.lora_r is not None and self.lora_r < 1:
            raise UsageError(f"--lora-r {self.lora_r}: must be at least 1")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise UsageError(f"--lora-alpha {self.lora_alpha}: must be at least 1")
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise UsageError(f"--lora-dropout {self.lora_dropout}: must be at least 0 and below 1")
