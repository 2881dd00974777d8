#!/usr/bin/env bash
# Lint, types and tests; options go to pytest.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
cd "$root"
bin="$root/.venv/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy" --strict src scripts examples
exec env OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$bin/python" -m pytest -q "$@"
