#!/usr/bin/env bash
# Score of Qwen3-32B with a LoRA adapter on MMLU or another benchmark in local files.
# Every variable can be set from the environment, and options can be added:
#   DATA_PATH=./mmlu/data/test/ bash examples/mcore/qwen3/evaluate_qwen3_32b_lora_ptd.sh --max-eval-samples 20
CHECKPOINT="${CHECKPOINT:-./model_weights/qwen3_mcore/}"            # converted weights, or an HF folder
CHECKPOINT_LORA="${CHECKPOINT_LORA:-./ckpt/qwen3_lora}"             # what the LoRA recipe saved, settings included
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf/}"       # the HF model's folder
TASK="${TASK:-mmlu}"                                                # benchmark
DATA_PATH="${DATA_PATH:-./mmlu/data/test/}"                         # its files
TP="${TP:-4}"                                                       # tensor-parallel size: any; weights are re-cut
PP="${PP:-1}"                                                       # pipeline-parallel size: any

# shellcheck source=examples/mcore/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

launch evaluate_qwen3_32b_lora_ptd evaluation.py \
    --load "$CHECKPOINT" --lora-load "$CHECKPOINT_LORA" \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --bf16 \
    --task "$TASK" --task-data-path "$DATA_PATH" \
    --output-path "logs/evaluate_qwen3_32b_lora_ptd.json" \
    "$@"
