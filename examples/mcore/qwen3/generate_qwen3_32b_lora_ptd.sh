#!/usr/bin/env bash
# Answers of Qwen3-32B with a LoRA adapter: PROMPT's, or a chat in the terminal.
# Every variable can be set from the environment, and options can be added:
#   PROMPT="Who are you?" bash examples/mcore/qwen3/generate_qwen3_32b_lora_ptd.sh --max-new-tokens 512
CHECKPOINT="${CHECKPOINT:-./model_weights/qwen3_mcore/}"            # converted weights, or an HF folder
CHECKPOINT_LORA="${CHECKPOINT_LORA:-./ckpt/qwen3_lora}"             # what the LoRA recipe saved, settings included
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf/}"       # the HF model's folder
PROMPT="${PROMPT:-}"                                                # a question; empty: chat in a terminal
TP="${TP:-4}"                                                       # tensor-parallel size: any; weights are re-cut
PP="${PP:-1}"                                                       # pipeline-parallel size: any

# shellcheck source=examples/mcore/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

launch generate_qwen3_32b_lora_ptd inference.py \
    --load "$CHECKPOINT" --lora-load "$CHECKPOINT_LORA" \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --bf16 \
    --max-new-tokens 256 \
    ${PROMPT:+--prompt "$PROMPT"} "$@"
