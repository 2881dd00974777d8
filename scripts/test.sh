#!/usr/bin/env bash
# Lint, types and tests; options go to pytest. Tests with drawn examples draw the same ones each time;
# RANDOM_EXAMPLES=5000 in the environment draws so many others in each such test.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
cd "$root"
bin="$root/.venv/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy" --strict src scripts examples
exec env OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$bin/python" -m pytest -q "$@"
