#!/usr/bin/env bash
# Rows of a question with a chosen and a rejected answer (json, jsonl, parquet) to training files for Qwen3.
# Every variable can be set from the environment, and options can be added:
#   INPUT=./dataset/my_pairs.jsonl bash examples/mcore/qwen3/data_convert_qwen3_pairwise.sh --overwrite
INPUT="${INPUT:-./dataset/orca_rlhf.jsonl}"                         # file or folder of rows
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf/}"       # the HF model's folder
OUTPUT_PREFIX="${OUTPUT_PREFIX:-./pairwise_dataset/orca_rlhf}"      # DATA_PATH of the DPO recipe
HANDLER_NAME="${HANDLER_NAME:-AlpacaStylePairwiseHandler}"          # how a row is read
MAP_KEYS="${MAP_KEYS:-{\"prompt\":\"question\",\"query\":\"\",\"system\":\"system\"\}}"  # columns; {}: usual ones
PROMPT_TYPE="${PROMPT_TYPE:-qwen3}"                                 # prompt template
ENABLE_THINKING="${ENABLE_THINKING:-none}"                          # true, false or none: see --help
WORKERS="${WORKERS:-4}"                                             # processes that tokenise

# shellcheck source=examples/mcore/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

run_tool data_convert_qwen3_pairwise preprocess_data.py \
    --input "$INPUT" --output-prefix "$OUTPUT_PREFIX" --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --tokenizer-type PretrainedFromHF --handler-name "$HANDLER_NAME" --map-keys "$MAP_KEYS" \
    --prompt-type "$PROMPT_TYPE" --enable-thinking "$ENABLE_THINKING" --workers "$WORKERS" --log-interval 1000 \
    "$@"
