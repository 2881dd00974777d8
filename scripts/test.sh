#!/usr/bin/env bash
# Lint, types and tests. With --fast as the first option, tests that compile, need root or a browser or are slow are left
# out, and a compiler that refuses shows that none was forgotten. Other options go to pytest: -n 0 runs in one process.
# Tests with drawn examples draw the same ones each time; RANDOM_EXAMPLES=5000 in the environment draws so many others
# in each such test.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
cd "$root"
bin="$root/.venv/bin"
# Files stay whole, so that what a file compiles for all its tests is compiled once.
options=(-q -n 2 --dist loadfile --no-loadscope-reorder)
if [[ ${1:-} == --fast ]]; then
    shift
    export CXX="$root/tests/helpers/refusing_compiler.sh"
    options+=(-m "not (compile or families or browser or root or slow)" --ignore tests/families)
fi
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy" --strict src scripts examples tests
exec env OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$bin/python" -m pytest "${options[@]}" "$@"
