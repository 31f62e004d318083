#!/usr/bin/env bash
# DPO of Qwen3-8B: a LoRA adapter learns which of two answers of up to 4096 tokens is preferred.
# Every variable can be set from the environment, and options can be added:
#   TP=2 DPO_BETA=0.2 bash examples/mcore/qwen3/dpo_qwen3_8b_4K_lora_ptd.sh --pref-ftx 0.1
CKPT_LOAD_DIR="${CKPT_LOAD_DIR:-./model_weights/qwen3_mcore/}"      # converted weights, or an HF folder: the reference
CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/qwen3_dpo}"                  # where checkpoints go
DATA_PATH="${DATA_PATH:-./pairwise_dataset/orca_rlhf}"              # output prefix of the recipe of pairs
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf/}"       # the HF model's folder
TP="${TP:-1}"                                                       # tensor-parallel size: any; weights are re-cut
PP="${PP:-2}"                                                       # pipeline-parallel size: any
SEQ_LENGTH="${SEQ_LENGTH:-4096}"                                    # longest prompt with an answer, in tokens
MBS="${MBS:-2}"                                                     # pairs per forward pass
GBS="${GBS:-16}"                                                    # pairs per optimizer step
TRAIN_ITERS="${TRAIN_ITERS:-2000}"                                  # optimizer steps
DPO_BETA="${DPO_BETA:-0.1}"                                         # how strongly the reference holds
DPO_LOSS_TYPE="${DPO_LOSS_TYPE:-sigmoid}"                           # sigmoid, robust, hinge or ipo

# shellcheck source=examples/mcore/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

launch dpo_qwen3_8b_4K_lora_ptd posttrain_gpt.py \
    --stage dpo --dpo-beta "$DPO_BETA" --dpo-loss-type "$DPO_LOSS_TYPE" --is-pairwise-dataset \
    --finetune --bf16 --seed 42 --load "$CKPT_LOAD_DIR" --save "$CKPT_SAVE_DIR" --save-interval "$TRAIN_ITERS" \
    --tokenizer-name-or-path "$TOKENIZER_PATH" --data-path "$DATA_PATH" --split 100,0,0 \
    --seq-length "$SEQ_LENGTH" --no-pad-to-seq-lengths \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --use-distributed-optimizer \
    --micro-batch-size "$MBS" --global-batch-size "$GBS" --train-iters "$TRAIN_ITERS" \
    --lr 5e-6 --min-lr 5e-7 --lr-decay-style cosine --lr-warmup-fraction 0.1 \
    --weight-decay 0.0 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 \
    --lora-r "${LORA_R:-16}" --lora-alpha "${LORA_ALPHA:-32}" --lora-fusion \
    --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 \
    --log-interval 1 "$@"
