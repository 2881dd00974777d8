"""Somebody swaps the bytes of an artifact between the look at them and their use: what was verified is what is used."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.store_entries import Entry, make_entry
from pipevault.errors import CorruptEntryError, UnsafeVaultError
from pipevault.settings.ownership import Trust
from pipevault.store.vault import Vault

CONTEXT = multiprocessing.get_context("fork")
GOOD, EVIL = b"good" * 5000, b"evil" * 5000
MEMBER, GROUP = 54321, 54320
"""A user and a group that nobody here has."""
ENOUGH = 20


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    return make_entry(tmp_path / "source", "a", {"graph.so": GOOD})


def renames(artifact: Path, stop: Any, swaps: Any) -> None:
    """Put another file in the artifact's place, and the right one back."""
    right, other = artifact.with_name("right"), artifact.with_name("other")
    os.link(artifact, right)
    while not stop.is_set():
        other.write_bytes(EVIL)
        os.replace(other, artifact)
        os.link(right, other)
        os.replace(other, artifact)
        swaps.value += 1


def writes(artifact: Path, stop: Any, swaps: Any) -> None:
    """Write to the very file that may be open elsewhere."""
    while not stop.is_set():
        for data in (EVIL, GOOD):
            with artifact.open("r+b") as file:
                file.write(data)
        swaps.value += 1


def attack(vault: Vault, entry: Entry, how: Callable[[Path, Any, Any], None], user: int | None) -> Counter[str]:
    """What loads got while ``how`` ran in another process, as ``user``."""
    [ref] = entry.manifest.artifacts
    artifact = vault.layout.artifact_file(ref.digest)
    stop, swaps = CONTEXT.Event(), CONTEXT.Value("q", 0)

    def run() -> None:
        if user is not None:
            os.setgroups([])
            os.setgid(GROUP)
            os.setuid(user)
        how(artifact, stop, swaps)

    process = CONTEXT.Process(target=run, daemon=True)
    process.start()
    seen: Counter[str] = Counter()
    until_s = time.monotonic() + 60
    try:
        while (seen["good"] < ENOUGH or swaps.value < ENOUGH) and time.monotonic() < until_s:
            try:
                file = vault.open_artifact(ref)
            except (CorruptEntryError, UnsafeVaultError):
                seen["refused"] += 1
                continue
            with file:
                time.sleep(0.002)  # the moment between the look and the use
                seen["good" if file.path.read_bytes() == GOOD else "other"] += 1
    finally:
        stop.set()
        process.join()
    assert process.exitcode == 0
    assert swaps.value >= ENOUGH, "the attack did not run"
    return seen


def test_renames_by_another_process_of_this_user(tmp_path: Path, entry: Entry) -> None:
    vault = Vault.open(tmp_path / "vault")
    vault.publish(entry.manifest, entry.files)
    seen = attack(vault, entry, renames, None)
    assert seen["good"] >= ENOUGH
    assert not seen["other"]


@pytest.mark.root
@pytest.mark.parametrize("how", [renames, writes])
def test_a_member_of_the_group_that_may_write(
    open_folder: Path, entry: Entry, how: Callable[[Path, Any, Any], None]
) -> None:
    vault = Vault.open(open_folder / "vault", trust=Trust(allow_group_write=True))
    vault.publish(entry.manifest, entry.files)
    [ref] = entry.manifest.artifacts
    for path in (open_folder, *open_folder.rglob("*")):
        os.chown(path, 0, GROUP)
    artifact = vault.layout.artifact_file(ref.digest)
    artifact.chmod(0o664)
    artifact.parent.chmod(0o775)
    seen = attack(vault, entry, how, MEMBER)
    assert seen["good"] >= ENOUGH
    assert not seen["other"]
