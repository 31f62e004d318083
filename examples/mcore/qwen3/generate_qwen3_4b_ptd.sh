#!/usr/bin/env bash
# Answers of Qwen3-4B: PROMPT's, or a chat in the terminal.
# Every variable can be set from the environment, and options can be added:
#   PROMPT="Who are you?" bash examples/mcore/qwen3/generate_qwen3_4b_ptd.sh --max-new-tokens 512
CHECKPOINT="${CHECKPOINT:-./model_weights/qwen3_mcore/}"            # converted weights, or an HF folder
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf/}"       # the HF model's folder
PROMPT="${PROMPT:-}"                                                # a question; empty: chat in a terminal
TP="${TP:-1}"                                                       # tensor-parallel size: any; weights are re-cut
PP="${PP:-1}"                                                       # pipeline-parallel size: any

# shellcheck source=examples/mcore/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

launch generate_qwen3_4b_ptd inference.py \
    --load "$CHECKPOINT" \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --bf16 \
    --prompt-type qwen3 \
    --max-new-tokens 256 \
    ${PROMPT:+--prompt "$PROMPT"} "$@"
