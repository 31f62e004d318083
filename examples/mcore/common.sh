# shellcheck shell=bash
# What every recipe shares; sourced by the recipes, not run.
#
#   run_tool NAME SCRIPT [options]      one process: conversion, data
#   launch NAME SCRIPT [options]        torchrun, through scripts/launch.py: all else; needs TP and PP
#
# Both write what is printed to logs/NAME.log as well and keep the command's exit status. Paths stay relative to the
# folder from which the recipe is called.
#
# Environment:
#   DRY_RUN=1          print the command and stop
#   RESUME=1           training continues from the newest complete checkpoint in CKPT_SAVE_DIR
#   MAX_RESTARTS=3     with RESUME=1: how often a launch starts its processes anew after one of them has died
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT NPROC_PER_NODE    as torchrun takes them
#   MINDSPEED_LLM_DEVICE=cpu|cuda|npu                          instead of what the machine has
#   PYTHON             the interpreter (default: .venv of this repository, else python3)
#   ASCEND_SET_ENV     CANN's set_env.sh where it is not in its usual place
set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x "$REPO/.venv/bin/python" ]] && PYTHON="$REPO/.venv/bin/python"
fi
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1800}"
# Notes that every process of every run would repeat: optional packages that are not needed, renamed torch functions.
_quiet="ignore:Apex is not installed:UserWarning,ignore:Transformer Engine and Apex are not installed:UserWarning"
_quiet="$_quiet,ignore::FutureWarning:torch.distributed.c10d_logger,ignore:full scope is deprecated:UserWarning"
export PYTHONWARNINGS="${PYTHONWARNINGS:-$_quiet}"

for _set_env in "${ASCEND_SET_ENV:-}" /usr/local/Ascend/cann/set_env.sh /usr/local/Ascend/ascend-toolkit/set_env.sh; do
    if [[ -f "$_set_env" ]]; then
        set +u # CANN's file reads variables that may be unset
        # shellcheck source=/dev/null
        source "$_set_env"
        set -u
        break
    fi
done

# The device asked for: by --device among the options, else by the environment, else auto.
_device() {
    local device="${MINDSPEED_LLM_DEVICE:-auto}" word previous=""
    for word in "$@"; do
        [[ "$previous" == --device ]] && device="$word"
        [[ "$word" == --device=* ]] && device="${word#*=}"
        previous="$word"
    done
    echo "$device"
}

# Accelerators that a device kind can use on this machine; 0 for the CPU.
_accelerators() {
    local device="$1" visible="" count=0 listed
    if [[ "$device" == npu || "$device" == auto ]]; then
        visible="${ASCEND_RT_VISIBLE_DEVICES:-}"
        listed=(/dev/davinci[0-9]*)
        [[ -e "${listed[0]}" ]] && count="${#listed[@]}"
    fi
    if [[ "$count" == 0 && ("$device" == cuda || "$device" == auto) ]] && command -v nvidia-smi >/dev/null; then
        visible="${CUDA_VISIBLE_DEVICES:-}"
        count="$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)"
    fi
    if [[ "$count" != 0 && -n "$visible" ]]; then
        count="$(tr ',' '\n' <<<"$visible" | grep -c .)"
    fi
    echo "$count"
}

# Wrong options are reported here, once, before any process is started: exit status 2.
_check_options() {
    local word
    "$PYTHON" -m mindspeed_llm.arguments.check "$@" || exit $?
    for word in "$@"; do
        if [[ "$word" == --help || "$word" == -h ]]; then
            exit 0 # the check has printed it
        fi
    done
}

# _execute NAME COMMAND...: print it, or run it with its output kept in logs/NAME.log.
_execute() {
    local name="$1"
    shift
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        printf '%q ' "$@"
        echo
        return
    fi
    mkdir -p logs
    # pipefail, set above, makes the status that of the command and not that of tee.
    "$@" 2>&1 | tee "logs/$name.log"
}

run_tool() {
    local name="$1" script="$2"
    shift 2
    _check_options "$script" "$@"
    _execute "$name" "$PYTHON" "$REPO/$script" "$@"
}

launch() {
    local name="$1" script="$2"
    shift 2
    if [[ "$script" == posttrain_gpt.py && "${RESUME:-0}" == 1 ]]; then
        set -- "$@" --auto-resume
    fi
    _check_options "$script" "$@"
    local nnodes="${NNODES:-1}" node_rank="${NODE_RANK:-0}" address="${MASTER_ADDR:-localhost}" port="${MASTER_PORT:-6000}"
    local seen nproc="${NPROC_PER_NODE:-${NPUS_PER_NODE:-}}"
    seen="$(_accelerators "$(_device "$@")")"
    if [[ -z "$nproc" ]]; then
        # Training uses every accelerator (data parallelism); answering needs one copy of the model.
        nproc=$((TP * PP / nnodes > 0 ? TP * PP / nnodes : 1))
        [[ "$seen" != 0 && "$script" == posttrain_gpt.py ]] && nproc="$seen"
    fi
    if [[ "$seen" == 0 && -z "${OMP_NUM_THREADS:-}" ]]; then
        local threads=$(($(nproc) / nproc))
        export OMP_NUM_THREADS="$((threads > 0 ? threads : 1))"
    fi
    if [[ "${DRY_RUN:-0}" != 1 && "$node_rank" == 0 ]] && (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null; then
        echo "$name: port $port on this machine is taken by another program; choose a free one: MASTER_PORT=$((port + 1)) bash $0" >&2
        exit 1
    fi
    [[ "$node_rank" != 0 ]] && name="$name.node$node_rank"
    local restarts=()
    [[ -n "${MAX_RESTARTS:-}" ]] && restarts=(--max_restarts "$MAX_RESTARTS")
    _execute "$name" "$PYTHON" "$REPO/scripts/launch.py" "${restarts[@]}" --nproc_per_node "$nproc" --nnodes "$nnodes" \
        --node_rank "$node_rank" --master_addr "$address" --master_port "$port" "$REPO/$script" "$@"
}
