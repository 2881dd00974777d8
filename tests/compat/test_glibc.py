"""Freed memory is kept while a pipeline generates, and given back afterwards."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys

import pytest

from pipevault.cache.rehearsal import generating
from pipevault.compat import glibc
from pipevault.compat.glibc import keeping_freed_memory

KEEPING, USUAL = list(glibc._KEEPING.items()), list(glibc._USUAL.items())

PROGRAM = """
import resource, sys, torch
from pipevault.compat.glibc import give_back, keeping_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

faults()
outside = faults()
with keeping_freed_memory():
    faults()
    inside = faults()
    torch.ones(900 << 20, dtype=torch.uint8)
    kept = resident_mb()
give_back()
print(outside, inside, kept, resident_mb())
"""


def measured(**environment: str) -> list[int]:
    own = {name: value for name, value in os.environ.items() if name not in glibc._DECIDED}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**own, **environment}, capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
class TestPages:
    """Counted by the kernel: a page that a process touches first is a fault."""

    least = 10 * (64 << 20) // resource.getpagesize() // 1000  # huge pages make them few

    def test_memory_is_used_again_inside_and_mapped_each_time_outside(self) -> None:
        outside, inside, kept_mb, after_mb = measured()
        assert outside > self.least
        assert inside < outside // 100
        assert kept_mb > 900
        assert after_mb < kept_mb - 700, "it was given back"

    def test_where_the_user_has_set_glibcs_own_variables_nothing_is_done(self) -> None:
        outside, inside, *_ = measured(MALLOC_MMAP_THRESHOLD_="1000000")
        assert inside > outside // 2


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    made: list[tuple[int, int]] = []
    keeping = glibc._Keeping()
    keeping._mallopt = lambda parameter, value: made.append((parameter, value)) or 1
    monkeypatch.setattr(glibc, "_KEEPING_NOW", keeping)
    return made


def test_the_first_block_begins_and_the_last_one_ends(calls: list[tuple[int, int]]) -> None:
    with keeping_freed_memory():
        with pytest.raises(ValueError, match="inner"), keeping_freed_memory():
            raise ValueError("inner")
        assert calls == KEEPING
    assert calls == KEEPING + USUAL


def test_a_forked_child_begins_again(calls: list[tuple[int, int]]) -> None:
    with keeping_freed_memory():
        glibc._KEEPING_NOW.restart()
        assert calls == KEEPING + USUAL
    assert calls == KEEPING + USUAL
    with keeping_freed_memory():
        assert calls[4:] == KEEPING


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keeping = glibc._Keeping()
    assert keeping._mallopt is None
    assert keeping.trim(0) == 0


@pytest.mark.parametrize("variable", [*glibc._DECIDED, "GLIBC_TUNABLES"])
def test_each_of_glibcs_variables_counts(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "glibc.malloc.mmap_threshold=1000000")
    assert glibc._Keeping()._mallopt is None


def test_a_generation_keeps_memory(calls: list[tuple[int, int]]) -> None:
    with generating({}):
        assert calls == KEEPING
    assert calls == KEEPING + USUAL


def test_an_older_glibc_takes_a_smaller_value(calls: list[tuple[int, int]]) -> None:
    """Had the other limit been set before, tensors of any size would be mapped each time."""

    def refusing(parameter: int, value: int) -> int:
        calls.append((parameter, value))
        return int(parameter != glibc._M_MMAP_THRESHOLD or value <= 32 << 20)

    glibc._KEEPING_NOW._mallopt = refusing
    with keeping_freed_memory():
        assert calls == [KEEPING[0], USUAL[0], KEEPING[1]]
