#!/usr/bin/env bash
# Tells its version as the real compiler does and refuses to compile: the fast lane runs with it.
for argument in "$@"; do
    case $argument in
    -c | -o | -shared | *.cpp | *.o)
        printf 'the fast lane compiles nothing: mark %s\n' "${PYTEST_CURRENT_TEST:-the test} with compile" >&2
        exit 1
        ;;
    esac
done
exec g++ "$@"
