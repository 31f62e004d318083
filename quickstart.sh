#!/usr/bin/env bash
# Sets the environment up and runs the whole LoRA workflow, with the recipes users run, on a bundled tiny Qwen3.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: bash quickstart.sh

Makes or reuses .venv (see scripts/setup_env.sh --help), then makes a tiny Qwen3 (3.5 million parameters), converts it,
tunes it fully on bundled questions and answers, teaches it a new name by LoRA, asks it before and after, scores it on
a quiz, merges and exports it, and compares the export in transformers with our own answers. Each stage has a
requirement; one that is missed ends the run with exit status 1. Takes some minutes on two CPU cores.

environment:
  QUICKSTART_DIR         folder of everything made (default ./quickstart_run; an earlier run there is replaced)
  QUICKSTART_SEED        of the weights, the rows and the name (default 1)
  QUICKSTART_NAME        the new name (default: one made up from the seed); Latin letters, digits, Chinese characters
  QUICKSTART_STEPS       steps of full tuning (default 300)
  QUICKSTART_LORA_STEPS  steps of LoRA tuning (default 100; with 0 the identity requirement must be missed)
  MINDSPEED_LLM_DEVICE   cpu (default), cuda or npu
  PYTHON, TORCH_SPEC     see scripts/setup_env.sh --help
HELP
}
case "${1:-}" in
    "") ;;
    --help | -h) usage && exit 0 ;;
    *) echo "quickstart.sh: error: unknown option '$1'; settings come from the environment, see --help" >&2 && exit 2 ;;
esac

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
RECIPES="$ROOT/examples/mcore/qwen3"
WORK="${QUICKSTART_DIR:-./quickstart_run}"
SEED="${QUICKSTART_SEED:-1}"
STEPS="${QUICKSTART_STEPS:-300}"
LORA_STEPS="${QUICKSTART_LORA_STEPS:-100}"
MARK=.made_by_quickstart

whole_number() {
    [[ "$2" =~ ^[0-9]+$ && "$2" -ge "$3" ]] && return
    echo "quickstart.sh: error: $1=$2 is not a whole number from $3" >&2
    exit 2
}
whole_number QUICKSTART_SEED "$SEED" 0
whole_number QUICKSTART_STEPS "$STEPS" 1
whole_number QUICKSTART_LORA_STEPS "$LORA_STEPS" 0

bash "$ROOT/scripts/setup_env.sh"
export PYTHON="$ROOT/.venv/bin/python"
export MINDSPEED_LLM_DEVICE="${MINDSPEED_LLM_DEVICE:-cpu}"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

NAME="$("$PYTHON" -m mindspeed_llm.quickstart.make name --seed "$SEED" --name "${QUICKSTART_NAME:-}")" || exit $?

if [[ -e "$WORK" ]]; then
    if [[ ! -e "$WORK/$MARK" && -n "$(ls -A "$WORK" 2>/dev/null || echo file)" ]]; then
        echo "quickstart.sh: error: $WORK holds something else; choose another QUICKSTART_DIR" >&2
        exit 1
    fi
    rm -rf "$WORK"
fi
mkdir -p "$WORK"
cd "$WORK"
WORK="$PWD"
touch "$MARK"
mkdir -p logs

# Every Python process from here on says that it is watched, and reports if it builds a model class of transformers.
export QUICKSTART_GUARD_LOG="$WORK/logs/watch.jsonl"
GUARD="$("$PYTHON" -c 'import sys, pathlib; from mindspeed_llm.quickstart.guard import write_site
print(write_site(pathlib.Path(sys.argv[1])))' "$WORK/guard")"
export PYTHONPATH="$GUARD:$PYTHONPATH"
if [[ -z "${MASTER_PORT:-}" ]]; then
    MASTER_PORT="$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
fi
export MASTER_PORT

titles=()
seconds=()
results=()

table() {
    local i rule
    rule="$(printf '%.0s-' {1..100})"
    printf '\n%-34s %8s  %s\n%s\n' step seconds result "$rule"
    for i in "${!titles[@]}"; do
        printf '%-34s %8s  %s\n' "$((i + 1)). ${titles[$i]}" "${seconds[$i]}" "${results[$i]}"
    done
    printf '%s\n%-34s %8s  %s\n' "$rule" "" "$SECONDS" "$1"
}

# step TITLE FUNCTION: run it with its output in a log; what it prints last is its result.
step() {
    local title="$1" function="$2" began log status=0
    log="logs/$(printf '%02d' $((${#titles[@]} + 1)))_$function.log"
    began="$(date +%s%N)"
    echo
    echo "== $title"
    # A subshell, whose settings concern its step alone; -e does not act in a function that is tested for success.
    (set -e && "$function") >"$log" 2>&1 &
    wait $! || status=$?
    titles+=("$title")
    seconds+=("$(awk -v ns=$(($(date +%s%N) - began)) 'BEGIN { printf "%.1f", ns / 1e9 }')")
    results+=("$(tail -n 1 "$log")")
    if [[ "$status" != 0 ]]; then
        tail -n 15 "$log" >&2
        results[-1]="FAILED: ${results[-1]}"
        table "failed at step ${#titles[@]} ($title); its log: $WORK/$log" >&2
        exit 1
    fi
    echo "   ${results[-1]}"
}

quick() { "$PYTHON" -m "mindspeed_llm.quickstart.$1" "${@:2}"; }

# The recipes compute in bf16 by default; in fp32 the export can be held against transformers token for token.
TUNE=(--bf16 false --no-shuffle --no-save-optim --lr-warmup-fraction 0.05 --log-interval 10 --seed "$SEED")
ASK=(--bf16 false --input-file data/prompts.jsonl --max-new-tokens 48 --micro-batch-size 32)
SCORE=(--bf16 false --evaluation-batch-size 10)
PLAIN_TEXT=(--map-keys '{"history": "history"}')

preprocess() { # FILE TEMPLATE [options]
    INPUT="data/$1.jsonl" OUTPUT_PREFIX="data/$1" TOKENIZER_PATH=hf PROMPT_TYPE="$2" ENABLE_THINKING=none WORKERS=1 \
        bash "$RECIPES/data_convert_qwen3_instruction.sh" "${@:3}"
}

losses() { # LOG: first and last loss, and the time of a step
    awk '/lm loss:/ { match($0, /lm loss: [^ ]+/); l = substr($0, RSTART + 9, RLENGTH - 9); if (first == "") first = l; last = l
        match($0, /\(ms\): [^ ]+/); ms = substr($0, RSTART + 6, RLENGTH - 6); match($0, /\/ *[0-9]+ /); n = substr($0, RSTART + 1) + 0 }
        END { printf "%d steps, loss %.3f -> %.4f, %.0f ms a step\n", n, first, last, ms }' "$1"
}

make_model() { quick make model --folder hf --seed "$SEED"; }

make_data() {
    quick make prompts --folder data
    local made
    made="$(quick make base --folder data --tokenizer hf --seed "$SEED")"
    preprocess base qwen3
    preprocess quiz empty "${PLAIN_TEXT[@]}"
    echo "$made"
}

to_megatron() {
    LOAD_DIR=hf SAVE_DIR=mcore TP=1 PP=1 bash "$RECIPES/ckpt_convert_qwen3_hf2mcore.sh" --params-dtype fp32
    echo "$(du -sh mcore | cut -f1) in $WORK/mcore"
}

tune_base() {
    CKPT_LOAD_DIR=mcore CKPT_SAVE_DIR=base TOKENIZER_PATH=hf DATA_PATH=data/base SEQ_LENGTH=512 MBS=32 GBS=32 TRAIN_ITERS="$STEPS" \
        bash "$RECIPES/tune_qwen3_0point6b_4K_full_ptd.sh" "${TUNE[@]}" --data-path data/base data/quiz --lr 2e-3 --min-lr 2e-5
    losses logs/tune_qwen3_0point6b_4K_full_ptd.log
}

ask_base() { # FILE
    OMP_NUM_THREADS=1 CHECKPOINT=base TOKENIZER_PATH=hf \
        bash "$RECIPES/generate_qwen3_0point6b_ptd.sh" "${ASK[@]}" --output-file "$1"
}

answer_before() {
    ask_base before.jsonl
    quick show before.jsonl
    quick gates base before.jsonl --name "$NAME"
}

score_before() {
    CHECKPOINT=base TOKENIZER_PATH=hf DATA_PATH="$ROOT/mindspeed_llm/quickstart/data/quiz" \
        bash "$RECIPES/evaluate_qwen3_0point6b_ptd.sh" "${SCORE[@]}" --output-path quiz_before.json
    quick gates quiz quiz_before.json
}

make_identity() {
    local made
    made="$(quick make identity --folder data --tokenizer hf --seed "$SEED" --name "$NAME")"
    preprocess identity qwen3
    preprocess quiz_replay empty "${PLAIN_TEXT[@]}"
    echo "$made"
}

tune_lora() {
    if [[ "$LORA_STEPS" == 0 ]]; then
        echo "skipped: QUICKSTART_LORA_STEPS=0"
        return
    fi
    CKPT_LOAD_DIR=base CKPT_SAVE_DIR=lora TOKENIZER_PATH=hf DATA_PATH=data/identity SEQ_LENGTH=512 MBS=32 GBS=32 \
        TRAIN_ITERS="$LORA_STEPS" bash "$RECIPES/tune_qwen3_0point6b_4K_lora_ptd.sh" "${TUNE[@]}" \
        --data-path data/identity data/quiz_replay --lr 4e-3 --min-lr 4e-5
    losses logs/tune_qwen3_0point6b_4K_lora_ptd.log
}

answer_after() {
    if [[ "$LORA_STEPS" == 0 ]]; then
        ask_base after.jsonl
    else
        OMP_NUM_THREADS=1 CHECKPOINT=base CHECKPOINT_LORA=lora TOKENIZER_PATH=hf \
            bash "$RECIPES/generate_qwen3_0point6b_lora_ptd.sh" "${ASK[@]}" --output-file after.jsonl
    fi
    quick show before.jsonl after.jsonl
    quick gates tuned after.jsonl --before before.jsonl --name "$NAME"
}

score_after() {
    CHECKPOINT=base CHECKPOINT_LORA=lora TOKENIZER_PATH=hf DATA_PATH="$ROOT/mindspeed_llm/quickstart/data/quiz" \
        bash "$RECIPES/evaluate_qwen3_0point6b_lora_ptd.sh" "${SCORE[@]}" --output-path quiz_after.json
    quick gates quiz quiz_after.json --before quiz_before.json
}

merge_and_export() {
    LOAD_DIR=base CHECKPOINT_LORA=lora SAVE_DIR=export bash "$RECIPES/ckpt_convert_qwen3_mcore2hf_lora.sh"
    echo "export: $(du -sh export | cut -f1) in $WORK/export"
}

verify_export() {
    QUICKSTART_GUARD_ALLOW=1 quick verify export after.jsonl --max-new-tokens 48
}

watched() { quick gates guard "$QUICKSTART_GUARD_LOG"; }

echo "quickstart: seed $SEED, new name $NAME, device $MINDSPEED_LLM_DEVICE, files in $WORK"
step "tiny Qwen3 and tokenizer" make_model
step "base data (recipe)" make_data
step "HF to Megatron (recipe)" to_megatron
step "full tuning (recipe)" tune_base
step "answers before (recipe)" answer_before
grep -A1 -E '^  [^ ]' logs/05_answer_before.log
step "quiz before (recipe)" score_before
step "identity data (recipe)" make_identity
step "LoRA tuning (recipe)" tune_lora
step "answers after (recipe)" answer_after
grep -A2 -E '^  [^ ]' logs/09_answer_after.log
step "quiz after (recipe)" score_after
step "merge and export (recipe)" merge_and_export
step "export in transformers" verify_export
grep -A2 -E '^  [^ ]' logs/12_verify_export.log
step "no transformers model before that" watched
table "all requirements met; the tuned model is in $WORK/export"
