#!/usr/bin/env bash
# Makes or reuses .venv with everything this repository needs; seconds when nothing has changed.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: bash scripts/setup_env.sh

Creates or reuses .venv beside the sources and installs mindspeed_llm in it, editable, with tests and evaluation.
A torch that is already installed (in .venv, or visible to the Python it is made from) is kept at its exact version.

environment:
  PYTHON      Python 3.10 to 3.13 to make .venv from (default: the first one found)
  TORCH_SPEC  what to install when there is no torch (default: the CPU build of torch 2.13.0; on a machine with
              an NVIDIA GPU the default build of 2.13.0; on an Ascend machine nothing: see the message)
HELP
}
if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    usage
    exit 0
fi

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
STAMP="$VENV/.mindspeed_llm_setup"
TORCH_VERSION=2.13.0

fail() {
    echo "setup: $*" >&2
    exit 1
}

# What the environment was made for: when none of it has changed there is nothing to do.
fingerprint() {
    { echo "$ROOT" && cat "$ROOT/pyproject.toml" "$ROOT/scripts/setup_env.sh"; } | sha256sum | cut -d' ' -f1
}

suitable_python() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        suitable_python "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.10 to 3.13"
        echo "$PYTHON"
        return
    fi
    local name
    for name in python3 python python3.12 python3.11 python3.13 python3.10; do
        if command -v "$name" >/dev/null && suitable_python "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "no Python 3.10 to 3.13 found; install one, or name it: PYTHON=/path/to/python3.11 $0"
}

make_venv() {
    local python options=()
    python="$(find_python)" || exit 1
    # Vendors' images carry a torch built for their machine: let the new environment see it.
    if "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
        options=(--system-site-packages)
    fi
    echo "setup: making .venv from $python"
    "$python" -m venv "${options[@]}" "$VENV" || {
        rm -rf "$VENV"
        fail "$python cannot make a virtual environment (on Debian and Ubuntu: install python3-venv)"
    }
    # A torch inside an activated virtual environment is not among the system's packages: name its folder.
    if ((${#options[@]})); then
        "$python" -c 'import os, sys, torch; sys.prefix != sys.base_prefix and print(os.path.dirname(torch.__path__[0]))' \
            >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer_environment.pth"
    fi
}

# The exact versions of what must not be replaced, as pip constraints; empty when there is no torch yet.
installed_torch() {
    "$VENV/bin/python" - <<'PY'
from importlib import metadata
for name in ("torch", "torch_npu", "torchvision", "torchaudio", "triton"):
    try:
        print(f"{name}=={metadata.version(name)}")
    except metadata.PackageNotFoundError:
        pass
PY
}

install_torch() {
    local pip=("$VENV/bin/python" -m pip install --quiet)
    if [[ -n "${TORCH_SPEC:-}" ]]; then
        "${pip[@]}" "$TORCH_SPEC"
    elif command -v npu-smi >/dev/null; then
        fail "an Ascend NPU is present but no torch: install the torch and torch_npu that belong to the installed CANN" \
            "into $VENV (or into the Python it is made from), then run this again; or say TORCH_SPEC=torch==$TORCH_VERSION for the CPU alone"
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        echo "setup: installing torch $TORCH_VERSION with CUDA (TORCH_SPEC chooses another)"
        "${pip[@]}" "torch==$TORCH_VERSION"
    else
        echo "setup: installing torch $TORCH_VERSION for the CPU (TORCH_SPEC chooses another)"
        "${pip[@]}" "torch==$TORCH_VERSION+cpu" 2>/dev/null || "${pip[@]}" "torch==$TORCH_VERSION"
    fi
}

if [[ -f "$STAMP" && "$(cat "$STAMP")" == "$(fingerprint)" && -x "$VENV/bin/python" ]]; then
    exit 0
fi
started=$SECONDS
[[ -x "$VENV/bin/python" ]] || make_venv
suitable_python "$VENV/bin/python" || fail "$VENV does not hold a Python 3.10 to 3.13; remove it and run this again"
[[ "$(installed_torch)" == *torch==* ]] || install_torch
installed_torch >"$VENV/constraints.txt"
echo "setup: installing mindspeed_llm and what it needs, keeping $(paste -sd' ' "$VENV/constraints.txt")"
"$VENV/bin/python" -m pip install --quiet --constraint "$VENV/constraints.txt" --editable "${ROOT}[eval,dev]"
fingerprint >"$STAMP"
echo "setup: done in $((SECONDS - started)) s"
