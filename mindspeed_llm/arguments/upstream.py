"""Flags of upstream's scripts that need nothing here, and those that would mean something else here.

A flag is accepted without effect only when leaving it out gives the same numbers; otherwise it is refused with its
reason. A flag that a program declares itself is never looked up here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Accepted:
    """A flag that is read and then not needed.

    Attributes:
        reason: why nothing has to be done.
        values: how many values follow: 0, 1, or "*" for any number.
        allowed: the only values that need nothing; any other one is refused. Empty: every value.
    """

    reason: str
    values: int | str = 0
    allowed: tuple[str, ...] = ()


_FUSED = "fused kernels are used wherever the device has them, with the same result"
_MCORE = "megatron-core is the only engine"
_SOFTMAX = "attention accumulates its softmax in float32 on every device"
_HALF = "loss scaling belongs to float16 training; bfloat16 and float32 need none"
_PACKAGED = "the installed megatron-core is used"
_COMMUNICATION = "a scheduling detail that the engine decides for each layout"
_FAMILY = "the model family's weight table knows it"
_VOCAB = "informational upstream; sizes come from the model's config.json"

ACCEPTED: dict[str, Accepted] = {
    "use_mcore_models": Accepted(_MCORE),
    "transformer_impl": Accepted("the local implementation is the only one", 1, ("local",)),
    "megatron_path": Accepted(_PACKAGED, 1),
    "use_flash_attn": Accepted(_FUSED),
    "use_fused_rotary_pos_emb": Accepted(_FUSED),
    "use_fused_swiglu": Accepted(_FUSED),
    "use_fused_rmsnorm": Accepted(_FUSED),
    "use_fused_mlp": Accepted(_FUSED),
    "no_masked_softmax_fusion": Accepted(_FUSED),
    "no_bias_gelu_fusion": Accepted(_FUSED),
    "no_bias_swiglu_fusion": Accepted(_FUSED),
    "no_bias_dropout_fusion": Accepted(_FUSED),
    "no_rope_fusion": Accepted(_FUSED),
    "no_persist_layer_norm": Accepted(_FUSED),
    "no_gradient_accumulation_fusion": Accepted(_FUSED),
    "cross_entropy_loss_fusion": Accepted("loss and frozen output layer are one function on every device", 0),
    "cross_entropy_fusion_impl": Accepted("there is one implementation", 1, ("native", "te")),
    "use_rotary_position_embeddings": Accepted("every supported family uses rotary positions, as its config.json says"),
    "attention_softmax_in_fp32": Accepted(_SOFTMAX),
    "init_method_std": Accepted("weights are always loaded, never drawn at random", 1),
    "initial_loss_scale": Accepted(_HALF, 1),
    "min_loss_scale": Accepted(_HALF, 1),
    "loss_scale_window": Accepted(_HALF, 1),
    "hysteresis": Accepted(_HALF, 1),
    "distributed_backend": Accepted("--device decides between nccl, hccl and gloo", 1, ("nccl", "hccl", "gloo")),
    "no_shared_storage": Accepted("only training keeps a cache on disk"),
    "no_async_tensor_model_parallel_allreduce": Accepted(_COMMUNICATION),
    "no_overlap_p2p_communication": Accepted(_COMMUNICATION),
    "variable_seq_lengths": Accepted("pipeline stages always exchange batches at their own length"),
    "layers_pattern": Accepted("the decoder's layers have one name in every family", "*"),
    "lora_register_forward_hook": Accepted("the embedding output always carries gradients when layers need them", "*"),
    "load_checkpoint_loosely": Accepted("checkpoints are read by tensor name; every name is still checked"),
    "tokenizer_not_use_fast": Accepted("the tokenizer.json of the model is used; its tokens are the same"),
    "tokenizer_padding_side": Accepted("batches are padded on the right", 1, ("right",)),
    "vocab_file": Accepted("the tokenizer comes from the model folder", 1, ("None", "none")),
    "moe_grouped_gemm": Accepted("experts are computed together wherever a model only answers"),
    "moe_permutation_async_comm": Accepted(_COMMUNICATION),
    "moe_token_dispatcher_type": Accepted(_COMMUNICATION, 1, ("alltoall", "allgather", "alltoall_seq")),
    "refer_model_iter": Accepted("the reference answers each micro-batch once, at any size", 1),
    "manual_gc": Accepted("garbage collection needs no steering here"),
    "manual_gc_interval": Accepted("garbage collection needs no steering here", 1),
}

ACCEPTED_BY_SCRIPT: dict[str, dict[str, Accepted]] = {
    "convert_ckpt.py": {
        "framework": Accepted(_MCORE, 1, ("megatron_bridge", "megatron")),
        "model_type": Accepted("GPT is the only model type", 1, ("GPT",)),
        "loader": Accepted("--load-model-type names the source format", 1),
        "saver": Accepted("--save-model-type names the target format", 1),
        "max_queue_size": Accepted("tensors are streamed without a queue", 1),
        "ckpt_cfg_path": Accepted(_FAMILY, 1),
        "tokenizer_model": Accepted("tokenizer files come from the HF folder", 1),
        "w_pack": Accepted(_FAMILY, "*"),
        "add_dense_bias": Accepted(_FAMILY),
        "post_norm": Accepted(_FAMILY),
        "embed_layernorm": Accepted(_FAMILY),
        "true_vocab_size": Accepted(_VOCAB, 1),
        "no_checking": Accepted("every tensor's name, shape and type is always checked"),
        "save_layer_by_layer": Accepted("a block of one tensor is in memory at a time, always"),
    },
    "preprocess_data.py": {
        "datasets": Accepted("unused upstream too", "*"),
        "dataset_impl": Accepted("memory-mapped files are the only kind", 1, ("mmap",)),
        "cache_dir": Accepted("no cache is kept: the input is read afresh", 1),
        "overwrite_cache": Accepted("no cache is kept: the input is read afresh"),
        "make_vocab_size_divisible_by": Accepted(_VOCAB, 1),
        "pad_vocab_size_to": Accepted(_VOCAB, 1),
        "tokenizer_model": Accepted("--tokenizer-name-or-path names the folder of the tokenizer", 1),
    },
    "evaluation.py": {
        "broadcast": Accepted("every rank sees the samples its layout needs"),
        "greedy": Accepted("answers are compared by likelihood; nothing is sampled"),
        "eval_language": Accepted("the task decides its language", 1, ("en",)),
    },
}

_QLORA = "4-bit base weights are not supported (docs/lora.md says why); LoRA on bf16 weights needs no conversion flag"
_LU = "LU-LoRA's local update rule is not implemented; use LoRA"
_REFERENCE = (
    "the reference of --stage dpo is --load without the adapter; to prefer over a tuned model, merge its adapter with "
    "convert_ckpt.py and give the result to --load"
)
_LAYERS = "layers are divided evenly over the stages; choose a pipeline size that divides them"
_LEGACY = "only checkpoints with megatron-core names are read and written"
_TOKENIZER_FOLDER = "tokenizer files are read from the folder that --tokenizer-name-or-path names"
_EVAL = "tasks use lm-eval's own prompt and scoring, so that scores can be compared"

REFUSED: dict[str, str] = {
    "fp16": "float16 training with loss scaling is not supported; use --bf16 or --fp32",
    "qlora": _QLORA,
    "qlora_nf4": _QLORA,
    "qlora_save_dequantize": _QLORA,
    "lu_lora_final_layer_index": _LU,
    "lu_lora_lr": _LU,
    "lu_lora_lr_ratio": _LU,
    "moe_tp_extend_ep": "give --expert-tensor-parallel-size 1, and --expert-model-parallel-size TP x EP instead",
    "mla_mm_split": "latent attention's up projections are kept whole, as training here wants them; leave it out",
    "add_output_layer_bias": "no supported family's output layer has a bias; leave it out",
    "num_layer_list": _LAYERS,
    "noop_layers": _LAYERS,
    "load_from_legacy": _LEGACY,
    "save_to_legacy": _LEGACY,
    "load_hf_from_config": "exported files are written directly; give --hf-cfg-dir for config and tokenizer",
    "save_lora_to_hf": "exporting the adapter alone is not supported yet; leave it out to export the merged model",
    "padded_samples": "samples are never padded to fill an epoch: epochs are joined instead",
    "full_shuffle_instruction_dataset": "each epoch is shuffled anew by --seed; use --no-shuffle to keep the order",
    "ref_model": _REFERENCE,
    "ref_load": _REFERENCE,
    "ref_adapter_load": _REFERENCE,
    "ref_adapters": _REFERENCE,
    "rpo_alpha": "the chosen answer's own loss has the weight --pref-ftx here, each pair counting alike",
    "enable_hf2mg_convert": "--load reads an HF folder directly, at any layout; leave the flag out",
    "enable_mg2hf_convert": "export with convert_ckpt.py --load-model-type mg --save-model-type hf",
    "trust_remote_code": "code shipped inside a model folder is never executed",
    "use_ascend_coc": "it is not compatible with LoRA (upstream refuses it too); leave it out",
    "script_data_dir": "loading scripts are not executed; convert the data to json, jsonl, csv or parquet",
    "hf_datasets_params": "--input reads json, jsonl, csv, parquet and arrow files directly; name the file there",
    "streaming": "--input reads files of any size piece by piece; leave the flag out",
    "split_sentences": "upstream divides texts by nltk's punkt model, which is downloaded and unpickled; give one "
    "sentence per row, e.g. a .txt file with a sentence per line",
    "keep_newlines": "it belongs to --split-sentences, which is not supported; line breaks in texts are always kept",
    "merge_file": _TOKENIZER_FOLDER,
    "reward_tokens": "process rewards are not supported; leave it out",
    "data_obfuscation": "obfuscated embeddings are not supported; leave it out",
    "obf_seed_content": "obfuscated embeddings are not supported; leave it out",
    "reasoning_effort": "templates have no such setting; --prompt-type hf takes the model's own chat template",
    "drop_thinking": "--enable-thinking false removes thoughts",
    "instruction_template": _EVAL,
    "alternative_prompt": _EVAL,
    "origin_postprocess": _EVAL,
    "chain_of_thought": _EVAL,
}


def accepted_for(script: str) -> dict[str, Accepted]:
    """The flags accepted without effect by one entry script ("posttrain_gpt.py")."""
    return {**ACCEPTED, **ACCEPTED_BY_SCRIPT.get(script, {})}
