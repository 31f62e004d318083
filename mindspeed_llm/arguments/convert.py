"""Options of `convert_ckpt.py`."""

from dataclasses import dataclass
from typing import ClassVar

from mindspeed_llm.arguments.lora import TARGET_MODULES
from mindspeed_llm.arguments.schema import Program, option

FORMATS = ("hf", "mg")


@dataclass
class ConvertOptions(Program):
    """Convert a model between Hugging Face and Megatron checkpoints of any layout, and merge a LoRA adapter into it.

    The source's own layout, sizes and adapter settings are read from its files. hf is a folder of safetensors with a
    config.json; mg is a folder of iter_*/mp_rank_* files.
    """

    SCRIPT: ClassVar[str] = "convert_ckpt.py"
    EXAMPLE: ClassVar[str] = """
python convert_ckpt.py --load-model-type hf --save-model-type mg \\
    --load-dir ./model_from_hf/qwen3_hf/ --save-dir ./model_weights/qwen3_mcore/ \\
    --target-tensor-parallel-size 1 --target-pipeline-parallel-size 2 --params-dtype bf16
"""

    load_model_type: str = option(help="Format of the source.", choices=FORMATS)
    save_model_type: str = option(help="Format of the result.", choices=FORMATS)
    load_dir: str = option(help="Folder of the source.")
    save_dir: str = option(
        help="Folder of the result. Where it holds a config.json, an hf result goes to its subfolder mg2hg."
    )
    target_tensor_parallel_size: int = option(1, help="Tensor-parallel size of an mg result.", unit="processes")
    target_pipeline_parallel_size: int = option(1, help="Pipeline-parallel size of an mg result.", unit="stages")
    target_expert_parallel_size: int = option(1, help="Expert-parallel size of an mg result; only 1 yet.")
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, help="Layers per interleaved chunk of an mg result; left out, each stage is one chunk.", unit="layers"
    )
    spec: list[str] | None = option(
        None,
        help="Layer specification as MODULE ATTRIBUTE; checked against the model's family.",
        nargs=2,
    )
    model_type_hf: str | None = option(None, help="Model family, e.g. qwen3; left out, as config.json says.")
    params_dtype: str | None = option(
        None, help="Type of the result's weights; left out, the source's own.", choices=("bf16", "fp16", "fp32")
    )
    make_vocab_size_divisible_by: int = option(
        1, help="Pad an mg result's embedding to a multiple of this times the tensor-parallel size.", unit="rows"
    )
    add_qkv_bias: bool | None = option(None, help="Checked against the model: its projections have a bias.")
    lora_load: str | None = option(None, help="LoRA checkpoint to merge into the source.")
    lora_r: int | None = option(None, help="Checked against the adapter: its rank.")
    lora_alpha: int | None = option(None, help="Scale of the adapter; checked where the adapter records its own.")
    lora_target_modules: list[str] | None = option(
        None, help="Checked against the adapter: the layers it adapts.", choices=TARGET_MODULES
    )
    hf_cfg_dir: str | None = option(
        None, help="Folder that gives an hf result its config, tokenizer and chat template; left out, the base's."
    )
    overwrite: bool = option(False, help="Replace an existing result.")
