"""Several processes on one vault at once: without a lock, with one, and with one that lies."""

from __future__ import annotations

import fcntl
import multiprocessing
import multiprocessing.context
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import pytest

from helpers.store_entries import Entry, leftovers, make_entry, whole
from pipevault.errors import CannotFreezeError
from pipevault.store.places import iter_foreign
from pipevault.store.vault import Vault

CONTEXT = multiprocessing.get_context("fork")
PROCESSES = 4
MISSES = 8
ROUNDS = 15


def publish_each_round(vault: Vault, entries: list[Entry], barrier: Barrier) -> None:
    for entry in entries:
        barrier.wait(20)
        vault.publish(entry.manifest, entry.files)
        assert whole(vault, entry.manifest)


def read_until(vault: Vault, entries: list[Entry], ended: Event) -> None:
    while not ended.is_set():
        for entry in entries:
            whole(vault, entry.manifest)


@pytest.mark.parametrize("same_bits", [True, False])
def test_processes_that_publish_one_key_at_once(vault: Vault, tmp_path: Path, same_bits: bool) -> None:
    barrier, ended = CONTEXT.Barrier(PROCESSES), CONTEXT.Event()
    shares = [
        [
            make_entry(
                tmp_path / f"source{number}",
                f"round {round_number}",
                {f"part{part}": f"{part} {number * (not same_bits)}".encode() * 2000 for part in range(3)},
            )
            for round_number in range(ROUNDS)
        ]
        for number in range(PROCESSES)
    ]
    reader = CONTEXT.Process(target=read_until, args=(vault, shares[0], ended))
    writers = [CONTEXT.Process(target=publish_each_round, args=(vault, share, barrier)) for share in shares]
    for process in (reader, *writers):
        process.start()
    for process in writers:
        process.join()
    ended.set()
    reader.join()
    assert [process.exitcode for process in (reader, *writers)] == [0] * (PROCESSES + 1)
    for versions in zip(*shares, strict=True):
        found = vault.lookup(versions[0].key)
        assert found in [version.manifest for version in versions]
        assert whole(vault, versions[0].manifest)
    assert leftovers(vault) == []
    assert list(iter_foreign(vault.layout)) == []


def test_processes_that_make_one_vault_at_once(tmp_path: Path) -> None:
    def make(barrier: Barrier, number: int) -> None:
        for round_number in range(ROUNDS):
            entry = make_entry(tmp_path / f"source{number}", str(number), {"x": bytes([number])})
            barrier.wait(20)
            vault = Vault.open(tmp_path / f"vault{round_number}")
            vault.publish(entry.manifest, entry.files)

    barrier = CONTEXT.Barrier(PROCESSES)
    processes = [CONTEXT.Process(target=make, args=(barrier, number)) for number in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    for round_number in range(ROUNDS):
        assert len(list(Vault.open(tmp_path / f"vault{round_number}").manifests())) == PROCESSES


def run_all(processes: list[multiprocessing.context.ForkProcess]) -> list[int | None]:
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def compile_once(root: Path, entry: Entry, compiled: Path, barrier: Barrier) -> None:
    vault = Vault.open(root)
    assert vault.lookup(entry.key) is None
    barrier.wait(20)
    with vault.lock(entry.key, timeout_s=60):
        if vault.lookup(entry.key) is None:
            with compiled.open("a") as file:
                file.write("x")
            vault.publish(entry.manifest, entry.files)
    assert whole(vault, entry.manifest)


def test_of_many_that_miss_one_compiles_and_all_load(vault: Vault, entry: Entry, tmp_path: Path) -> None:
    compiled, barrier = tmp_path / "compiled", CONTEXT.Barrier(MISSES)
    assert (
        run_all(
            [CONTEXT.Process(target=compile_once, args=(vault.root, entry, compiled, barrier)) for _ in range(MISSES)]
        )
        == [0] * MISSES
    )
    assert compiled.read_text() == "x"
    assert leftovers(vault) == []


def test_a_compilation_that_fails_is_not_remembered(vault: Vault, entry: Entry, tmp_path: Path) -> None:
    """The first two fail, and so do only they; the third compiles for all that come after."""
    tried, barrier = tmp_path / "tried", CONTEXT.Barrier(MISSES)

    def compile_or_fail() -> None:
        barrier.wait(20)
        with vault.lock(entry.key, timeout_s=60):
            if vault.lookup(entry.key) is None:
                with tried.open("a") as file:
                    file.write("x")
                if tried.stat().st_size <= 2:
                    raise CannotFreezeError("as planned")
                vault.publish(entry.manifest, entry.files)
        assert whole(vault, entry.manifest)

    codes = run_all([CONTEXT.Process(target=compile_or_fail) for _ in range(MISSES)])
    assert sorted(code or 0 for code in codes) == [0] * (MISSES - 2) + [1, 1]
    assert tried.read_text() == "xxx"
    assert leftovers(vault) == []
    with vault.lock(entry.key, timeout_s=0):
        pass


def test_locks_that_lie(vault: Vault, tmp_path: Path) -> None:
    """Everyone gets the lock, and publishes other bytes for the same key at the same time."""
    barrier = CONTEXT.Barrier(PROCESSES)
    entries = [
        [
            make_entry(
                tmp_path / f"source{number}",
                f"round {round_number}",
                {"shared": b"the same", **{f"part{part}": f"{part} {number}".encode() * 2000 for part in range(3)}},
                info={"by": number},
            )
            for number in range(PROCESSES)
        ]
        for round_number in range(ROUNDS)
    ]

    def freeze(number: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fcntl, "flock", lambda descriptor, operation: None)
            for versions in entries:
                entry = versions[number]
                with vault.lock(entry.key, timeout_s=0):
                    assert vault.lookup(entry.key) is None
                    barrier.wait(20)  # all are inside
                    published = vault.publish(entry.manifest, entry.files)
                    assert published in [version.manifest for version in versions]
                    assert whole(vault, published)
                    barrier.wait(20)
                    assert vault.lookup(entry.key) in [version.manifest for version in versions]
                    assert whole(vault, entry.manifest)

    assert run_all([CONTEXT.Process(target=freeze, args=(number,)) for number in range(PROCESSES)]) == [0] * PROCESSES
    for versions in entries:
        found = vault.lookup(versions[0].key)
        assert found in [version.manifest for version in versions]
        assert whole(vault, versions[0].manifest)
    assert leftovers(vault) == []
    assert list(iter_foreign(vault.layout)) == []
