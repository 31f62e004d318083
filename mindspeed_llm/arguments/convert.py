"""Options of `convert_ckpt.py`."""

from dataclasses import dataclass
from typing import ClassVar

from mindspeed_llm.arguments.schema import Program, option

FORMATS = ("hf", "mg")
CHECKPOINT_FORMATS = ("torch", "torch_dist")
IMPLEMENTATIONS = ("local", "transformer_engine")
DTYPES = ("bf16", "fp16", "fp32", "bfloat16", "float16", "float32")
SCHEDULES = ("dualpipev",)


@dataclass
class ConvertOptions(Program):
    """Convert a model between Hugging Face and Megatron checkpoints of any layout, and merge or move LoRA adapters.

    The source's own layout, sizes and adapter settings are read from its files. hf is a folder of safetensors (or
    .bin) with a config.json; mg is a folder of iter_*/mp_rank_* files or of megatron-core's torch_dist format.
    """

    SCRIPT: ClassVar[str] = "convert_ckpt.py"
    EXAMPLE: ClassVar[str] = """
python convert_ckpt.py --load-model-type hf --save-model-type mg \\
    --load-dir ./model_from_hf/qwen3_hf/ --save-dir ./model_weights/qwen3_mcore/ \\
    --target-tensor-parallel-size 1 --target-pipeline-parallel-size 2 --params-dtype bf16
"""

    load_model_type: str | None = option(
        None, help="Format of the source; left out, as its files show.", choices=FORMATS
    )
    save_model_type: str | None = option(
        None, help="Format of the result; left out, mg for an hf source and hf for an mg source.", choices=FORMATS
    )
    to_hf: bool = option(False, help="Another way to say --save-model-type hf, of whatever source.")
    to_mcore: bool = option(False, help="Another way to say --save-model-type mg.")
    load_dir: str | None = option(
        None,
        help="Folder of the source. A run folder stands for its newest checkpoint; left out, the base that --lora-load "
        "records.",
    )
    save_dir: str = option(
        help="Folder of the result. Where it holds a config.json, an hf result goes to its subfolder mg2hg."
    )
    target_tensor_parallel_size: int = option(1, help="Tensor-parallel size of an mg result.", unit="processes")
    target_pipeline_parallel_size: int = option(1, help="Pipeline-parallel size of an mg result.", unit="stages")
    target_expert_parallel_size: int = option(1, help="Expert-parallel size of an mg result.", unit="processes")
    expert_tensor_parallel_size: int | None = option(
        None, help="Ranks each expert is cut over; left out, the tensor-parallel size.", unit="processes"
    )
    moe_tp_extend_ep: bool = option(
        False, help="Spread whole experts over all tensor- times expert-parallel ranks of an mg result."
    )
    moe_grouped_gemm: bool = option(False, help="Store a rank's experts in shared tensors, as grouped kernels want.")
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, help="Layers per interleaved chunk of an mg result; left out, each stage is one chunk.", unit="layers"
    )
    num_layer_list: str | None = option(None, help="Layers of each stage, as 10,12,12,10; left out, equal ones.")
    noop_layers: str | None = option(
        None, help="Places of layers without weights that fill up uneven stages, as 0,47, in the filled numbering."
    )
    schedules_method: str | None = option(
        None, help="Stage order of an mg result: dualpipev is V-shaped.", choices=SCHEDULES
    )
    ckpt_format: str = option(
        "torch",
        help="Files of an mg result: one per rank, or megatron-core's reshardable format.",
        choices=CHECKPOINT_FORMATS,
    )
    transformer_impl: str = option(
        "local", help="Whose tensor names an mg result of torch files uses.", choices=IMPLEMENTATIONS
    )
    mtp_num_layers: int | None = option(
        None, help="Multi-token-prediction layers to carry over: 0 leaves them out; left out, all the source has."
    )
    spec: list[str] | None = option(
        None,
        help="Layer specification as MODULE ATTRIBUTE; checked against the model's family.",
        nargs=2,
    )
    model_type_hf: str | None = option(None, help="Model family, e.g. qwen3; left out, as config.json says.")
    params_dtype: str | None = option(
        None, help="Type of the result's weights; left out, the source's own.", choices=DTYPES
    )
    make_vocab_size_divisible_by: int = option(
        1, help="Pad an mg result's embedding to a multiple of this times the tensor-parallel size.", unit="rows"
    )
    add_qkv_bias: bool | None = option(None, help="Checked against the model: its projections have a bias.")
    num_layers: int | None = option(None, help="Checked against the model: its layers, no-op layers included or not.")
    first_k_dense_replace: int | None = option(
        None, help="Checked against the model: its first layers without experts."
    )
    lora_load: list[str] | None = option(
        None, help="LoRA adapters to merge into the source, or to convert: Megatron checkpoints or PEFT folders."
    )
    lora_weights: list[float] | None = option(
        None, help="Factor of each --lora-load; left out, 1 for each. Several adapters are added up."
    )
    merge_lora: bool = option(
        True, help="Merge the adapter into the base; false converts the adapter alone (mg: LoRA checkpoint, hf: PEFT)."
    )
    save_lora_to_hf: bool = option(
        False, help="Write the adapter alone as a PEFT folder (--save-model-type hf, --merge-lora false)."
    )
    lora_r: int | None = option(None, help="Checked against the adapter: its rank.")
    lora_alpha: int | None = option(None, help="Scale of the adapter; checked where the adapter records its own.")
    lora_target_modules: list[str] | None = option(
        None, help="Checked against the adapter: the layers it adapts, by megatron-core's or HF's names."
    )
    hf_cfg_dir: str | None = option(
        None, help="Folder that gives an hf result its config, tokenizer and chat template; left out, the base's."
    )
    max_shard_size: str = option("5GB", help="Largest file of an hf result, as 500MB or 5GB.")
    ignore_unknown: bool = option(False, help="Leave out tensors the model family does not know; they are listed.")
    test_convert_precision: bool = option(
        False, help="Compare the result with transformers (or peft) in float32 and fail when it is not the same model."
    )
    max_memory: str = option(
        "8GB",
        help="Memory the comparison may use; larger models are compared layer by layer.",
    )
    dry_run: bool = option(False, help="List every tensor, what it takes in bytes and memory; write nothing.")
    overwrite: bool = option(False, help="Replace an existing result.")
