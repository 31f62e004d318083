#!/usr/bin/env bash
# Qwen3 weights from Megatron to Hugging Face, any size of the family and any layout.
# Every variable can be set from the environment, and options can be added:
#   LOAD_DIR=./ckpt/qwen3_full bash examples/mcore/qwen3/ckpt_convert_qwen3_mcore2hf.sh
LOAD_DIR="${LOAD_DIR:-./model_weights/qwen3_mcore/}"                # Megatron weights, converted or fully tuned
SAVE_DIR="${SAVE_DIR:-./model_from_hf/qwen3_hf/}"                   # result; in mg2hg/ below it if it holds a model

# shellcheck source=examples/mcore/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

run_tool ckpt_convert_qwen3_mcore2hf convert_ckpt.py \
    --load-model-type mg --save-model-type hf --model-type-hf qwen3 \
    --load-dir "$LOAD_DIR" --save-dir "$SAVE_DIR" \
    "$@"
