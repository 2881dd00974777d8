#!/usr/bin/env bash
# Freezes and runs the demo pipeline that ships with the package; options go to `pipevault demo`.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
exec "$root/.venv/bin/pipevault" demo "$@"
