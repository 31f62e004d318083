#!/usr/bin/env bash
# A LoRA adapter merged into its Qwen3 base, exported to Hugging Face.
# Every variable can be set from the environment, and options can be added:
#   CHECKPOINT_LORA=./ckpt/qwen3_lora bash examples/mcore/qwen3/ckpt_convert_qwen3_mcore2hf_lora.sh
LOAD_DIR="${LOAD_DIR:-./model_weights/qwen3_mcore/}"                # the base the adapter was trained on
CHECKPOINT_LORA="${CHECKPOINT_LORA:-./ckpt/qwen3_lora}"             # what the LoRA recipe saved, settings included
SAVE_DIR="${SAVE_DIR:-./model_from_hf/qwen3_hf/}"                   # result; in mg2hg/ below it if it holds a model

# shellcheck source=examples/mcore/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

run_tool ckpt_convert_qwen3_mcore2hf_lora convert_ckpt.py \
    --load-model-type mg --save-model-type hf --model-type-hf qwen3 \
    --load-dir "$LOAD_DIR" --lora-load "$CHECKPOINT_LORA" --save-dir "$SAVE_DIR" \
    "$@"
