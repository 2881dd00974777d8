"""Which failures of a build are of the moment; nothing is compiled."""

from __future__ import annotations

import errno

import pytest
import torch

from pipevault.errors import CannotFreezeError, InterruptedBuildError
from pipevault.graphs.inductor import BuildOptions, _build_error, build_digest, passing_reason
from pipevault.graphs.signature import describe_call


class CppCompileError(RuntimeError):
    """As torch raises it: known by its name and its text."""


def wrapped(cause: BaseException, *, explicitly: bool) -> Exception:
    try:
        try:
            raise cause
        except BaseException as error:
            if explicitly:
                raise RuntimeError("lowering failed") from error
            raise RuntimeError("lowering failed")  # noqa: B904
    except RuntimeError as outer:
        return outer


PASSING = [
    CppCompileError("C++ compile error\n\nOutput:\ng++: fatal error: Killed signal terminated program cc1plus"),
    CppCompileError("C++ compile error\n\nOutput:\n"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.EIO, "Input/output error"),
    RuntimeError("fatal error: error writing to /tmp/x.o: No space left on device"),
    MemoryError("no memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    TimeoutError("timed out"),
    RuntimeError("Command '['g++']' died with <Signals.SIGKILL: 9>."),
    RuntimeError("InductorError: AssertionError: /usr/lib/python3.11/distutils/core.py"),
]
STAYING = [
    CppCompileError("C++ compile error\n\nOutput:\n/tmp/x.cpp:12:3: error: 'foo' was not declared in this scope"),
    CppCompileError("/usr/bin/ld: undefined reference to `foo'"),
    OSError(errno.ENOENT, "No such file or directory"),
    RuntimeError("Could not guard on data-dependent expression u0 > 3"),
    CannotFreezeError("it draws random numbers"),
]


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_what_may_succeed_another_time_is_no_refusal(error: BaseException) -> None:
    for raised in (error, wrapped(error, explicitly=True), wrapped(error, explicitly=False)):
        assert passing_reason(raised)
        made = _build_error("AOTInductor", raised)  # type: ignore[arg-type]
        assert isinstance(made, InterruptedBuildError)
        assert "AOTInductor was interrupted: " in str(made)
        assert "nothing was stored" in str(made)


@pytest.mark.parametrize("error", STAYING, ids=str)
def test_what_will_fail_again_is_a_refusal(error: BaseException) -> None:
    for raised in (error, wrapped(error, explicitly=True), wrapped(error, explicitly=False)):
        assert passing_reason(raised) == ""
        made = _build_error("torch.export", raised)  # type: ignore[arg-type]
        assert type(made) is CannotFreezeError
        assert str(made).startswith("torch.export failed: ")


def test_a_cause_that_was_suppressed_does_not_count() -> None:
    error = RuntimeError("unrelated")
    error.__context__, error.__suppress_context__ = MemoryError(), True
    assert passing_reason(error) == ""
    error.__suppress_context__ = False
    assert passing_reason(error) == "MemoryError"


def test_what_decides_the_code_decides_the_build() -> None:
    call = describe_call((torch.zeros(2),), {"step": 3})
    digests = {
        build_digest("a", call.signature, BuildOptions()),
        build_digest("b", call.signature, BuildOptions()),
        build_digest("a", call.signature.fix([1], call.leaves), BuildOptions()),
        build_digest("a", call.signature, BuildOptions(weights="baked")),
        build_digest("a", call.signature, BuildOptions(config={"max_autotune": True})),
    }
    assert len(digests) == 5
    assert build_digest("a", call.signature, BuildOptions()) in digests
