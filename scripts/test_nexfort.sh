#!/usr/bin/env bash
# Tests backend nexfort with the nexfort and the torch that fit each other, in an environment of its own.
# Downloads about 3 GB the first time. PYTHON names an interpreter of Python 3.11 other than python3.11.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${NEXFORT_VENV:-$root/.venv-nexfort}
python=${PYTHON:-python3.11}

case ${1:-} in
    --help | -h)
        cat <<TEXT
usage: scripts/test_nexfort.sh [ARGUMENTS OF PYTEST]

Makes the environment NEXFORT_VENV ($venv) if it is not there: Python 3.11, torch 2.4.0,
nexfort 0.1.dev271, diffusers 0.31.0, transformers 4.46.3. Then runs tests/nexfort in it, on the CPU.
TEXT
        exit 0
        ;;
esac

ready="$venv/ready-1"
if [[ ! -f $ready ]]; then
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
        printf 'error: nexfort 0.1.dev271 needs Python 3.11; %s is another one. Set PYTHON.\n' "$python" >&2
        exit 1
    }
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet torch==2.4.0
    "$venv/bin/pip" install --quiet nexfort==0.1.dev271 onediff==1.2.0 onediffx==1.2.0 diffusers==0.31.0 \
        transformers==4.46.3 'numpy>=2.0,<2.3' accelerate 'click>=8.2' 'cryptography>=42' 'msgspec>=0.19' \
        'platformdirs>=4.2' 'rich>=13.8' 'safetensors>=0.5' pillow pytest hypothesis
    touch "$ready"
fi

cd "$root"
export CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH="$root/src"
exec "$venv/bin/python" -m pytest -p no:cacheprovider -rA tests/nexfort "$@"
