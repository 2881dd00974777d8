#!/usr/bin/env bash
# Tries the package with other versions of torch, each in a virtual environment of its own. Downloads gigabytes.
# PYTHON names another interpreter than python3.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage="usage: scripts/check_versions.sh [--dir FOLDER] [--demo-only] TORCH_VERSION..."

say() { printf '%s\n' "$*" >&2; }
fail() {
    say "error: $*"
    exit 1
}
refuse() {
    say "$*"
    say "$usage"
    exit 2
}

help() {
    cat <<TEXT
$usage

For each version: makes FOLDER/torch-VERSION, installs that torch, the package and its development tools, runs
\`pipevault demo\` twice (a miss, then a hit with the same pixels), then the tests of graphs and of the cache.
Prints one line for each version, "VERSION ok, ..." or "VERSION failed: ..."; what the steps print goes to
FOLDER/torch-VERSION.log. Exit code 1 if a version failed.

  --dir FOLDER   where the environments, vaults and logs go, and stay; else a temporary folder that is removed
                 unless a version failed
  --demo-only    leaves the tests out
TEXT
}

folder=""
demo_only=false
versions=()
while (($#)); do
    case $1 in
        --help | -h)
            help
            exit 0
            ;;
        --dir)
            [[ -n ${2:-} ]] || refuse "--dir needs a folder."
            folder=$2
            shift
            ;;
        --demo-only) demo_only=true ;;
        -*) refuse "unknown option $1." ;;
        *)
            [[ $1 =~ ^[0-9]+(\.[0-9]+)+([a-z0-9.+]*)$ ]] || refuse "'$1' is no version of torch."
            versions+=("$1")
            ;;
    esac
    shift
done
((${#versions[@]})) || refuse "no version of torch was given."

temporary=false
if [[ -z $folder ]]; then
    folder=$(mktemp -d "${TMPDIR:-/tmp}/pipevault-versions.XXXXXX")
    temporary=true
fi
mkdir -p "$folder" || fail "$folder cannot be made."
folder=$(cd "$folder" && pwd)
constraints="$folder/constraints.txt"
grep -v '^torch==' "$root/constraints.txt" >"$constraints"

# The torch that pip chose must be the one asked for: a dependency may have replaced it.
is_torch() { "$1" -c 'import sys, torch; sys.exit(torch.__version__.split("+")[0] != sys.argv[1].split("+")[0])' "$2"; }

field() { "$1" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$2" "$3"; }

run_demo() {
    local venv=$1 vault=$2 out=$3
    "$venv/bin/pipevault" demo --dir "$vault" --out "$out.png" --json >"$out.json"
}

# Prints "ok, ..." and returns 0, or "failed: ..." and returns 1.
try_version() {
    local version=$1 log=$2 venv="$folder/torch-$1" vault="$folder/vault-$1" python first second ready
    python="$venv/bin/python"
    rm -rf "$vault"
    if ! "${PYTHON:-python3}" -m venv --clear "$venv" >>"$log" 2>&1; then
        printf 'failed: no virtual environment\n'
        return 1
    fi
    if ! "$python" -m pip install --quiet --constraint "$constraints" "torch==$version" >>"$log" 2>&1; then
        printf 'failed: torch could not be installed\n'
        return 1
    fi
    if ! "$python" -m pip install --quiet --constraint "$constraints" --editable "${root}[dev]" "torch==$version" >>"$log" 2>&1; then
        printf 'failed: the package could not be installed beside this torch\n'
        return 1
    fi
    if ! is_torch "$python" "$version" >>"$log" 2>&1; then
        printf 'failed: another torch is installed, or it cannot be imported\n'
        return 1
    fi
    first="$folder/first-$version" second="$folder/second-$version"
    if ! run_demo "$venv" "$vault" "$first" 2>>"$log"; then
        printf 'failed: the demo could not be frozen\n'
        return 1
    fi
    if ! run_demo "$venv" "$vault" "$second" 2>>"$log"; then
        printf 'failed: the frozen demo could not be loaded\n'
        return 1
    fi
    if [[ $(field "$python" "$first.json" outcome) != miss || $(field "$python" "$second.json" outcome) != hit ]]; then
        printf 'failed: %s then %s, not miss then hit\n' \
            "$(field "$python" "$first.json" outcome)" "$(field "$python" "$second.json" outcome)"
        return 1
    fi
    if [[ $(field "$python" "$first.json" pixels_sha256) != "$(field "$python" "$second.json" pixels_sha256)" ]]; then
        printf 'failed: the hit drew other pixels than the miss\n'
        return 1
    fi
    ready="miss ready_s $(field "$python" "$first.json" ready_s), hit ready_s $(field "$python" "$second.json" ready_s)"
    if $demo_only; then
        printf 'ok, %s, tests left out\n' "$ready"
        return 0
    fi
    if ! (cd "$root" && "$python" -m pytest -q -p no:cacheprovider tests/graphs tests/cache) >>"$log" 2>&1; then
        printf 'failed: tests; %s\n' "$ready"
        return 1
    fi
    printf 'ok, %s\n' "$ready"
}

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
failed=0
for version in "${versions[@]}"; do
    log="$folder/torch-$version.log"
    : >"$log"
    say "Trying torch $version; see $log"
    if result=$(try_version "$version" "$log"); then
        printf '%s %s\n' "$version" "$result"
    else
        failed=1
        printf '%s %s\n' "$version" "$result"
        tail -n 20 "$log" >&2
    fi
done
if $temporary && ((!failed)); then
    rm -rf "$folder"
elif ((failed)); then
    say "Environments and logs are in $folder"
fi
exit "$failed"
