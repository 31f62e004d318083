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
    "target_modules": "lora_target_modules",
    "target_regex": "lora_target_modules",
    "exclude_modules": "lora_exclude_modules",
    "layers_to_transform": "lora_layers",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
    "modules_to_save": "lora_modules_to_save",
    "lorap_lr_ratio": "loraplus_lr_ratio",
    "init_lora_weights": "lora_init",
    # Megatron's own earlier names
    "model_parallel_size": "tensor_model_parallel_size",
    "batch_size": "micro_batch_size",
    # the converter of the current upstream spells the expert size like Megatron does
    "target_expert_model_parallel_size": "target_expert_parallel_size",
}

ALIASES_BY_SCRIPT: dict[str, dict[str, str]] = {
    # the export commands of ms-swift and Primus, in the converter's words; elsewhere some of these are options
    "convert_ckpt.py": {
        "tensor_model_parallel_size": "target_tensor_parallel_size",
        "pipeline_model_parallel_size": "target_pipeline_parallel_size",
        "expert_model_parallel_size": "target_expert_parallel_size",
        "model": "load_dir",
        "mcore_model": "load_dir",
        "load": "load_dir",
        "adapter_load": "lora_load",
        "mcore_adapters": "lora_load",
        "save": "save_dir",
        "output_dir": "save_dir",
        "hf_save_path": "save_dir",
        "convert_to_hf": "to_hf",
        "torch_dtype": "params_dtype",
    },
    # Megatron's own name of the folder, and transformers' of two options
    "posttrain_gpt.py": {
        "data_cache_path": "data_cache_dir",
        "group_by_length": "length_grouping",
        "wandb_project": "report_project",
        "dataloader_num_workers": "num_workers",
        # preferences, as ms-swift and TRL, and as LLaMA-Factory name them
        "rlhf_type": "stage",
        "beta": "dpo_beta",
        "loss_type": "dpo_loss_type",
        "label_smoothing": "dpo_label_smoothing",
        "pref_beta": "dpo_beta",
        "pref_loss": "dpo_loss_type",
        "save_steps": "save_interval",
        "early_stop_interval": "early_stopping_patience",
    },
}


def aliases_for(script: str) -> dict[str, str]:
    """The other names that one entry script ("convert_ckpt.py") understands."""
    return {**ALIASES, **ALIASES_BY_SCRIPT.get(script, {})}
