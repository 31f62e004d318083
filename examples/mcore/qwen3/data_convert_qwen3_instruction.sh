#!/usr/bin/env bash
# Instruction rows (json, jsonl, parquet) to training files for Qwen3.
# Every variable can be set from the environment, and options can be added:
#   INPUT=./dataset/my_rows.jsonl bash examples/mcore/qwen3/data_convert_qwen3_instruction.sh --overwrite
INPUT="${INPUT:-./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}"  # file or folder of rows
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf/}"       # the HF model's folder
OUTPUT_PREFIX="${OUTPUT_PREFIX:-./finetune_dataset/alpaca}"         # DATA_PATH of the tuning recipes
HANDLER_NAME="${HANDLER_NAME:-AlpacaStyleInstructionHandler}"       # how a row is read
PROMPT_TYPE="${PROMPT_TYPE:-qwen3}"                                 # prompt template
ENABLE_THINKING="${ENABLE_THINKING:-true}"                          # true, false or none: see --help
WORKERS="${WORKERS:-4}"                                             # processes that tokenise

# shellcheck source=examples/mcore/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

run_tool data_convert_qwen3_instruction preprocess_data.py \
    --input "$INPUT" --output-prefix "$OUTPUT_PREFIX" --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --tokenizer-type PretrainedFromHF --handler-name "$HANDLER_NAME" --prompt-type "$PROMPT_TYPE" \
    --enable-thinking "$ENABLE_THINKING" --workers "$WORKERS" --log-interval 1000 \
    "$@"
