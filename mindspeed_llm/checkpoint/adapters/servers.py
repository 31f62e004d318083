"""Which servers take an exported adapter, as far as it follows from its config and from what they document.

vLLM: `vllm.lora.peft_helper` and the engine option `--max-lora-rank` (16 unless raised): no modules_to_save, no DoRA,
one rank and alpha for all modules. SGLang: its page on LoRA serving: `--max-lora-rank`, `--lora-target-modules`.
"""

from collections.abc import Mapping
from typing import Any

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` can be."""


def describe_servers(config: Mapping[str, Any]) -> str:
    """One line on an adapter_config.json: its ranks, and vLLM's and SGLang's documented requirements."""
    highest = max([config["r"], *config["rank_pattern"].values()])
    against = []
    if config["modules_to_save"]:
        against.append(f"they take no modules_to_save ({', '.join(config['modules_to_save'])})")
    if config["rank_pattern"] or config["alpha_pattern"]:
        against.append("they take one rank and alpha, not rank_pattern and alpha_pattern")
    what = f"PEFT adapter of rank {highest} on {len(config['target_modules'])} target names"
    if against:
        return f"{what}: for peft and transformers; not for vLLM and SGLang: {'; '.join(against)} (their documentation)"
    limit = next((rank for rank in VLLM_RANKS if rank >= highest), None)
    vllm = (
        f"vLLM with --enable-lora --max-lora-rank {limit}"
        if limit
        else f"not vLLM, whose ranks end at {VLLM_RANKS[-1]}"
    )
    experts = (
        ", if they support LoRA on this model's experts" if any("expert" in n for n in config["target_modules"]) else ""
    )
    return (
        f"{what}: for peft, transformers, {vllm}, SGLang with --max-lora-rank {highest}{experts} (their documentation)"
    )
