#!/usr/bin/env bash
# Makes or reuses .venv and installs the package with its development tools; says nothing on standard output.
# PYTHON names another interpreter than python3.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
stamp="$venv/pipevault-installed.txt"

say() { printf '%s\n' "$*" >&2; }
fail() {
    say "error: $*"
    exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of version 3.10 or newer."
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if is_new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "Python 3.10 or newer is needed; python3 is $(python3 --version 2>&1 || true). Install one, or name it: PYTHON=/path/to/python3."
}

command -v "${CXX:-g++}" >/dev/null ||
    fail "no C++ compiler: ${CXX:-g++} was not found. Install g++ (Debian, Ubuntu: apt-get install g++), or name another in CXX."

if ! is_new_enough "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "Making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" >&2 ||
        fail "$python could not make a virtual environment (Debian, Ubuntu: apt-get install python3-venv)."
fi

# The folder belongs to the fingerprint: an editable installation points back to it.
fingerprint=$("$venv/bin/python" - "$root" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
hasher = hashlib.sha256(f"{sys.version}\n{root}\n".encode())
for name in ("pyproject.toml", "constraints.txt"):
    hasher.update((root / name).read_bytes())
print(hasher.hexdigest())
PYTHON
)
if [[ -f $stamp && $(<"$stamp") == "$fingerprint" ]]; then
    exit 0
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@" >&2; }
rm -f "$stamp"
# torch first and alone: asked for by another package, an open range would bring a newer build with its CUDA libraries.
say "Installing torch (the first time takes a while)"
pip install --quiet --constraint "$root/constraints.txt" torch ||
    fail "torch could not be installed; see the messages above. constraints.txt says which build is meant."
say "Installing pipevault and its development tools"
pip install --quiet --constraint "$root/constraints.txt" --editable "$root[dev]" ||
    fail "pipevault could not be installed; see the messages above."
printf '%s\n' "$fingerprint" >"$stamp"
