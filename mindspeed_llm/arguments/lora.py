"""How the model is adapted."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError

INITS = ("default", "pissa")
ADAPTER_DTYPES = ("auto", "float32", "bfloat16")


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
        None,
        help="Layers that get an adapter; giving any turns LoRA on. megatron-core's names (linear_qkv), HF's (q_proj "
        "v_proj), all-linear, all-router, all-embedding, names of single layers (decoder.layers.3.mlp.linear_fc1), or "
        "regular expressions of whole names of either kind.",
    )
    lora_exclude_modules: list[str] | None = option(
        None, help="Layers, named like targets, that get no adapter though --lora-target-modules names them."
    )
    lora_layers: list[int] | None = option(
        None, help="Numbers of the decoder layers that get adapters, from 0; left out, all."
    )
    lora_rank_pattern: list[str] | None = option(
        None, help="Other ranks: NAME=RANK, with layers named like targets; of several that fit, the first counts."
    )
    lora_alpha_pattern: list[str] | None = option(None, help="Other alphas: NAME=ALPHA, as in --lora-rank-pattern.")
    use_rslora: bool = option(False, help="Scale adapters by alpha / sqrt(r) instead of alpha / r (rsLoRA).")
    use_dora: bool = option(
        False,
        help="Train the length of every output row of W + BA apart from its direction (DoRA); in the modular form.",
    )
    lora_init: str = option(
        "default",
        help="Initial adapter. default: A uniform, B zero. pissa: the largest singular vectors of W, which the adapter "
        "takes out of the base; saved as an adapter of the unchanged base, of twice the rank when exported.",
        choices=INITS,
    )
    lora_dtype: str = option(
        "auto",
        help="Type of the adapters. auto: the base's, beside the optimizer's float32 master copy. float32 on a bf16 "
        "base runs in the modular form.",
        choices=ADAPTER_DTYPES,
    )
    loraplus_lr_ratio: float | None = option(
        None, help="LoRA+: learning rate of B, and of DoRA's lengths, as a multiple of --lr and --min-lr."
    )
    lora_modules_to_save: list[str] | None = option(
        None,
        help="Modules trained whole beside the adapters and saved with them, by megatron-core's or HF's names "
        "(embed_tokens, lm_head, norm).",
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
        if self.loraplus_lr_ratio is not None and not 0 < self.loraplus_lr_ratio < float("inf"):
            raise UsageError(f"--loraplus-lr-ratio {self.loraplus_lr_ratio:g}: must be a number above 0")
        if self.use_dora and self.lora_init == "pissa":
            raise UsageError("--use-dora and --lora-init pissa exclude each other: leave one of them out")
