#!/usr/bin/env bash
# LoRA tuning of Qwen3-32B on rows of up to 4096 tokens.
# Every variable can be set from the environment, and options can be added:
#   TP=2 DATA_PATH=./my_data/alpaca bash examples/mcore/qwen3/tune_qwen3_32b_4K_lora_ptd.sh --lr 2e-5
CKPT_LOAD_DIR="${CKPT_LOAD_DIR:-./model_weights/qwen3_mcore/}"      # converted weights, or an HF folder
CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/qwen3_lora}"                 # where checkpoints go
DATA_PATH="${DATA_PATH:-./finetune_dataset/alpaca}"                 # output prefix of the data recipe
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf/}"       # the HF model's folder
TP="${TP:-4}"                                                       # tensor-parallel size: any; weights are re-cut
PP="${PP:-1}"                                                       # pipeline-parallel size: any
SEQ_LENGTH="${SEQ_LENGTH:-4096}"                                    # longest row, in tokens
MBS="${MBS:-4}"                                                     # rows per forward pass
GBS="${GBS:-16}"                                                    # rows per optimizer step
TRAIN_ITERS="${TRAIN_ITERS:-2000}"                                  # optimizer steps

# shellcheck source=examples/mcore/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

launch tune_qwen3_32b_4K_lora_ptd posttrain_gpt.py \
    --stage sft --finetune --bf16 --seed 42 \
    --load "$CKPT_LOAD_DIR" --save "$CKPT_SAVE_DIR" --save-interval "$TRAIN_ITERS" \
    --tokenizer-name-or-path "$TOKENIZER_PATH" --data-path "$DATA_PATH" --split 100,0,0 \
    --seq-length "$SEQ_LENGTH" --no-pad-to-seq-lengths \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --use-distributed-optimizer \
    --micro-batch-size "$MBS" --global-batch-size "$GBS" --train-iters "$TRAIN_ITERS" \
    --lr 1.25e-5 --min-lr 1.25e-7 --lr-decay-style cosine --lr-warmup-fraction 0.01 \
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 \
    --lora-r "${LORA_R:-16}" --lora-alpha "${LORA_ALPHA:-32}" --lora-fusion \
    --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 \
    --log-interval 1 "$@"
