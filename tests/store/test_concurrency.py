"""Several processes on one vault at once, without a lock, as on a file system whose locks lie."""

from __future__ import annotations

import multiprocessing
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import pytest
from store_entries import Entry, leftovers, make_entry, whole

from pipevault.store.vault import Vault

CONTEXT = multiprocessing.get_context("fork")
PROCESSES = 4
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
    assert list(vault.foreign_files()) == []


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


def compile_once(root: Path, entry: Entry, compiled: Path) -> None:
    vault = Vault.open(root)
    with vault.lock(entry.key, timeout_s=60):
        if vault.lookup(entry.key) is None:
            with compiled.open("a") as file:
                file.write("x")
            vault.publish(entry.manifest, entry.files)
    assert whole(vault, entry.manifest)


def test_with_the_lock_one_compiles_for_all(vault: Vault, entry: Entry, tmp_path: Path) -> None:
    compiled = tmp_path / "compiled"
    processes = [CONTEXT.Process(target=compile_once, args=(vault.root, entry, compiled)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    assert compiled.read_text() == "x"
