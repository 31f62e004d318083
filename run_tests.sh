#!/usr/bin/env bash
# Sets the environment up and runs the whole test-suite, lint included.
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    cat <<'HELP'
usage: bash run_tests.sh [pytest arguments]

Makes or reuses .venv (see scripts/setup_env.sh --help) and runs pytest; ruff and shellcheck run as tests.
Where there are two cores and 12 GB of free memory, two processes share the test files; -n 0 uses one, as --pdb needs
it, -n 4 four.

  bash run_tests.sh                            everything
  bash run_tests.sh -m "not distributed"       without the tests that start several processes
  bash run_tests.sh tests/contract             one folder
HELP
    exit 0
fi

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
bash "$ROOT/scripts/setup_env.sh"
cd "$ROOT"
# A file's tests stay in one process, which keeps its models and references; files are taken in their order.
side_by_side=()
if (($(nproc) > 1)) && awk '/^MemAvailable/ { found = $2 > 12000000 } END { exit !found }' /proc/meminfo; then
    side_by_side=(-n 2 --dist loadfile --no-loadscope-reorder)
fi
exec .venv/bin/python -m pytest ${side_by_side[@]+"${side_by_side[@]}"} "$@"
