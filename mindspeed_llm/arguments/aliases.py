"""Other names under which an option is known, each with the canonical (Megatron) name it stands for.

Only names whose meaning, unit and value format are the same; a name that means something else is refused instead.
"""

ALIASES: dict[str, str] = {
    # shorthands in wide use
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "lora_rank": "lora_r",
    # Megatron's own earlier names
    "model_parallel_size": "tensor_model_parallel_size",
    "batch_size": "micro_batch_size",
    # the converter of the current upstream spells the expert size like Megatron does
    "target_expert_model_parallel_size": "target_expert_parallel_size",
}
