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
    what = f"PEFT adapter of rank {highest} for peft and transformers"
    against = ["no DoRA"] if config.get("use_dora") else []
    if config["modules_to_save"]:
        against.append(f"no modules_to_save ({', '.join(config['modules_to_save'])})")
    if config["rank_pattern"] or config["alpha_pattern"]:
        against.append("one rank and alpha for all modules, no rank_pattern and alpha_pattern")
    if against:
        return f"{what}; by their documentation not for vLLM and SGLang, which take {' and '.join(against)}"
    limit = next((rank for rank in VLLM_RANKS if rank >= highest), None)
    vllm = f"vLLM (--enable-lora --max-lora-rank {limit})" if limit else f"not vLLM (ranks up to {VLLM_RANKS[-1]})"
    experts = any(".experts." in name for name in config["target_modules"])
    where = ", where they support LoRA on this model's experts" if experts else ""
    return f"{what}; by their documentation also for {vllm} and SGLang (--max-lora-rank {highest}){where}"
