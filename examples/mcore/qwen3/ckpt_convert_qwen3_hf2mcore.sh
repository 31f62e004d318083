#!/usr/bin/env bash
# Qwen3 weights from Hugging Face to Megatron, any size of the family.
# Every variable can be set from the environment, and options can be added:
#   TP=2 PP=2 bash examples/mcore/qwen3/ckpt_convert_qwen3_hf2mcore.sh --overwrite
LOAD_DIR="${LOAD_DIR:-./model_from_hf/qwen3_hf/}"                   # the HF model's folder
SAVE_DIR="${SAVE_DIR:-./model_weights/qwen3_mcore/}"                # where the Megatron weights go
TP="${TP:-1}"                                                       # tensor-parallel size; loads at any other
PP="${PP:-2}"                                                       # pipeline-parallel size

# shellcheck source=examples/mcore/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

run_tool ckpt_convert_qwen3_hf2mcore convert_ckpt.py \
    --load-model-type hf --save-model-type mg --model-type-hf qwen3 --params-dtype bf16 \
    --target-tensor-parallel-size "$TP" --target-pipeline-parallel-size "$PP" \
    --load-dir "$LOAD_DIR" --save-dir "$SAVE_DIR" \
    "$@"
