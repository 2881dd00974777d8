#!/usr/bin/env bash
# Print how many lines of the core packages the tests run; the aim is 90 % of each. It is no gate: the exit code is that of
# the tests. --fast as the first option measures the fast lane; other options go to pytest.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python="$root/.venv/bin/python"
core=(cache runtime graphs fingerprint determinism store files)
# Children in the two files, and those that act as other users, may not write coverage's own data, and fail.
options=(-q -n 2 --dist loadfile --no-loadscope-reorder
    --ignore tests/store/test_file_systems.py --ignore tests/store/test_tier_contract.py)
if [[ ${1:-} == --fast ]]; then
    shift
    options+=(-m "not (compile or families or browser or root or slow)" --ignore tests/families)
else
    options+=(-m "not root")
fi
export COVERAGE_FILE
COVERAGE_FILE=$(mktemp -d)/coverage
trap 'rm -r "${COVERAGE_FILE%/*}"' EXIT
code=0
env OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$python" -m pytest "${options[@]}" --cov --cov-report= "$@" || code=$?
for name in "${core[@]}"; do
    total=$("$python" -m coverage report --format=total --precision=1 --include="*/pipevault/$name/*")
    printf '%-12s %5s %%\n' "$name" "$total"
done
"$python" -m coverage report --skip-covered --sort=cover \
    --include="$(printf '*/pipevault/%s/*,' "${core[@]}" | sed 's/,$//')"
exit "$code"
