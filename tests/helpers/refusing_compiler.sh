#!/usr/bin/env bash
# The compiler, but for graphs: the fast lane runs with it, so that a test which compiles and does not say so fails.
for argument in "$@"; do
    case $argument in
    *.wrapper.* | *.kernel.*)
        printf 'the fast lane compiles no graph: mark %s with compile\n' "${PYTEST_CURRENT_TEST:-the test}" >&2
        exit 1
        ;;
    esac
done
exec g++ "$@"
