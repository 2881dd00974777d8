"""What dead processes left is swept, and nothing of a process that lives or may live."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fault_steps import in_child
from store_entries import Entry, leftovers

from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.errors import LockTimeoutError
from pipevault.store.flock import HeldLock, try_lock
from pipevault.store.leftovers import LOCK_MIN_AGE_S, UNKNOWN_OWNER_MIN_AGE_S, Leftover, find_leftovers, sweep
from pipevault.store.liveness import ProcessIdentity, scratch_prefix
from pipevault.store.vault import Vault

KEY = digest_bytes(b"key")
HERE = ProcessIdentity.current()
DEAD = replace(HERE, started=1)
"""This process's number, used before by a process that ended."""
ELSEWHERE = replace(HERE, host="elsewhere")
OLD_S = 10.0 + max(UNKNOWN_OWNER_MIN_AGE_S, LOCK_MIN_AGE_S)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def add_staging(vault: Vault, owner: ProcessIdentity, *, marked: bool = True) -> Path:
    mark = owner.mark if marked else ""
    folder = vault.layout.staging_dir(host=owner.host, pid=owner.pid, random_hex=os.urandom(8).hex(), mark=mark)
    folder.mkdir(parents=True)
    (folder / "artifact").write_bytes(b"x" * 100)
    return folder


def add_lock(vault: Vault, key: Digest = KEY, note: ProcessIdentity | None = None) -> None:
    vault.layout.locks_dir.mkdir(exist_ok=True)
    for path in (vault.layout.lock_file(key), vault.layout.guard_file(key)):
        path.touch()
    if note is not None:
        vault.layout.holder_file(key).write_bytes(
            canonical_json({**note.to_json(), "since": "2025-01-31T12:00:00+00:00"})
        )


def make_older(path: Path, age_s: float) -> None:
    for place in (path, *path.rglob("*")):
        os.utime(place, times=(time.time() - age_s,) * 2, follow_symlinks=False)


def names(found: list[Leftover] | tuple[Leftover, ...]) -> list[str]:
    return [item.path.name for item in found]


def test_an_empty_vault_has_none(vault: Vault, temporary: Path) -> None:
    assert sweep(vault.layout, temporary_dir=temporary) == []


def test_the_systems_temporary_folder_is_the_default(
    vault: Vault, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    (temporary / f"pipevault-freeze-{DEAD.pid}-{DEAD.mark}-abc_1234").mkdir()
    assert len(sweep(vault.layout)) == 1


class TestStaging:
    def test_of_a_killed_process(self, vault: Vault, temporary: Path) -> None:
        def die() -> None:
            with vault.staging() as folder:
                (folder / "file").write_bytes(b"x" * 7)
                os._exit(0)

        in_child(die)
        [item] = sweep(vault.layout, temporary_dir=temporary)
        assert item.size_bytes == 7
        assert "ended" in item.reason
        assert leftovers(vault) == []

    def test_of_a_process_that_lives_stays_however_old(self, vault: Vault, temporary: Path) -> None:
        with vault.staging() as folder:
            (folder / "file").write_bytes(b"x")
            make_older(folder, OLD_S)
            assert sweep(vault.layout, temporary_dir=temporary, now_s=time.time() + 1e9) == []
            assert (folder / "file").exists()

    def test_of_another_living_process(self, vault: Vault, temporary: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from pipevault.store.vault import Vault\n"
            "with Vault.open(Path(sys.argv[1])).staging() as folder:\n"
            "    print(folder, flush=True); sys.stdin.read()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(vault.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert sweep(vault.layout, temporary_dir=temporary, now_s=time.time() + 1e9) == []
        assert folder.exists()
        process.kill()
        process.wait()
        assert names(sweep(vault.layout, temporary_dir=temporary)) == [folder.name]
        process.communicate()

    @pytest.mark.parametrize("marked", [True, False])
    def test_of_a_process_that_cannot_be_judged(self, vault: Vault, temporary: Path, marked: bool) -> None:
        young, old, ahead = (add_staging(vault, ELSEWHERE, marked=marked) for _ in range(3))
        make_older(young, UNKNOWN_OWNER_MIN_AGE_S - 60)
        make_older(old, UNKNOWN_OWNER_MIN_AGE_S + 60)
        make_older(ahead, -UNKNOWN_OWNER_MIN_AGE_S)
        assert names(sweep(vault.layout, temporary_dir=temporary)) == [old.name]
        assert young.exists()
        assert ahead.exists()

    def test_a_file_that_was_just_written_keeps_an_old_folder(self, vault: Vault, temporary: Path) -> None:
        folder = add_staging(vault, ELSEWHERE)
        make_older(folder, OLD_S)
        os.utime(folder / "artifact")
        make_older_only = time.time() - OLD_S
        os.utime(folder, times=(make_older_only,) * 2)
        assert sweep(vault.layout, temporary_dir=temporary) == []

    def test_foreign_files_and_links_stay(self, vault: Vault, temporary: Path, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.mkdir()
        (target / "precious").write_bytes(b"x")
        vault.layout.tmp_dir.mkdir(exist_ok=True)
        (vault.layout.tmp_dir / "notes.txt").write_bytes(b"x")
        link = vault.layout.staging_dir(host="h", pid=DEAD.pid, random_hex="0" * 16, mark=DEAD.mark)
        link.symlink_to(target)
        folder = add_staging(vault, DEAD)
        (folder / "link").symlink_to(target)
        assert sorted(names(sweep(vault.layout, temporary_dir=temporary))) == sorted([link.name, folder.name])
        assert (target / "precious").exists()
        assert (vault.layout.tmp_dir / "notes.txt").exists()


class TestLocks:
    def test_of_an_entry_that_exists(self, vault: Vault, entry: Entry, temporary: Path) -> None:
        vault.publish(entry.manifest, entry.files)
        with vault.lock(entry.key, timeout_s=0):
            pass
        swept = sweep(vault.layout, temporary_dir=temporary)
        assert names(swept) == [vault.layout.lock_file(entry.key).name, vault.layout.guard_file(entry.key).name]
        assert list(vault.layout.locks_dir.iterdir()) == []
        with vault.lock(entry.key, timeout_s=0):
            pass

    def test_of_an_entry_that_does_not_exist_waits(self, vault: Vault, temporary: Path) -> None:
        add_lock(vault)
        assert sweep(vault.layout, temporary_dir=temporary) == []
        now_s = time.time() + LOCK_MIN_AGE_S + 60
        assert len(sweep(vault.layout, temporary_dir=temporary, now_s=now_s)) == 2

    def test_that_is_held_stays(self, vault: Vault, entry: Entry, temporary: Path) -> None:
        vault.publish(entry.manifest, entry.files)
        with vault.lock(entry.key, timeout_s=0):
            assert sweep(vault.layout, temporary_dir=temporary, now_s=time.time() + 1e9) == []
            assert vault.layout.holder_file(entry.key).exists()
            with pytest.raises(LockTimeoutError), vault.lock(entry.key, timeout_s=0):
                pytest.fail("two holders")

    def test_that_a_dead_process_left_held_keeps_its_note(self, vault: Vault, temporary: Path) -> None:
        """Without the note, nobody could take the lock over."""
        add_lock(vault, note=DEAD)
        held = try_lock(vault.layout.lock_file(KEY))
        assert isinstance(held, HeldLock)
        assert sweep(vault.layout, temporary_dir=temporary, now_s=time.time() + 1e9) == []
        with vault.lock(KEY, timeout_s=0):
            pass
        held.release()

    def test_whose_guard_is_held_stays(self, vault: Vault, entry: Entry, temporary: Path) -> None:
        vault.publish(entry.manifest, entry.files)
        add_lock(vault, entry.key, note=DEAD)
        held = try_lock(vault.layout.guard_file(entry.key))
        assert isinstance(held, HeldLock)
        assert sweep(vault.layout, temporary_dir=temporary) == []
        held.release()
        assert len(sweep(vault.layout, temporary_dir=temporary)) == 3

    def test_the_note_of_a_dead_process_goes(self, vault: Vault, temporary: Path) -> None:
        add_lock(vault, note=DEAD)
        assert names(sweep(vault.layout, temporary_dir=temporary)) == [vault.layout.holder_file(KEY).name]

    def test_a_note_without_a_lock_file(self, vault: Vault, temporary: Path) -> None:
        add_lock(vault, note=DEAD)
        vault.layout.lock_file(KEY).unlink()
        assert len(sweep(vault.layout, temporary_dir=temporary)) == 2
        assert list(vault.layout.locks_dir.iterdir()) == []

    @pytest.mark.parametrize("note", [HERE, ELSEWHERE])
    def test_where_locks_lie_a_note_of_a_process_that_may_live_stays(
        self, vault: Vault, temporary: Path, note: ProcessIdentity
    ) -> None:
        add_lock(vault, note=note)
        assert sweep(vault.layout, temporary_dir=temporary) == []

    def test_the_old_note_of_another_host_goes(self, vault: Vault, temporary: Path) -> None:
        add_lock(vault, note=ELSEWHERE)
        now_s = time.time() + UNKNOWN_OWNER_MIN_AGE_S + 60
        assert vault.layout.holder_file(KEY).name in names(sweep(vault.layout, temporary_dir=temporary, now_s=now_s))

    def test_foreign_files_stay(self, vault: Vault, temporary: Path) -> None:
        vault.layout.locks_dir.mkdir()
        (vault.layout.locks_dir / "notes.lock").touch()
        assert sweep(vault.layout, temporary_dir=temporary, now_s=time.time() + 1e9) == []

    def test_waiters_and_a_sweep_at_once(self, vault: Vault, entry: Entry, temporary: Path, tmp_path: Path) -> None:
        """Removing lock files lets no two processes in."""
        vault.publish(entry.manifest, entry.files)
        inside = tmp_path / "inside"

        def take() -> None:
            for _ in range(40):
                with vault.lock(entry.key, timeout_s=60):
                    inside.mkdir()
                    inside.rmdir()

        def sweeping() -> None:
            for _ in range(120):
                sweep(vault.layout, temporary_dir=temporary)

        assert all_succeed([take, take, take, sweeping])


def all_succeed(functions: list[Callable[[], None]]) -> bool:
    import multiprocessing

    processes = [multiprocessing.get_context("fork").Process(target=function) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return all(process.exitcode == 0 for process in processes)


class TestTemporary:
    @pytest.mark.parametrize("purpose", ["freeze", "load", "compare", "golden"])
    def test_folders_of_a_dead_process(self, vault: Vault, temporary: Path, purpose: str) -> None:
        dead = temporary / f"pipevault-{purpose}-{DEAD.pid}-{DEAD.mark}-abc_1234"
        alive = temporary / f"{scratch_prefix(purpose)}abc_1234"
        for folder in (dead, alive):
            folder.mkdir()
            (folder / "graph.pt2").write_bytes(b"x" * 9)
        [item] = sweep(vault.layout, temporary_dir=temporary, now_s=time.time() + 1e9)
        assert (item.path, item.size_bytes) == (dead, 9)
        assert alive.exists()

    def test_folders_that_a_lock_beside_them_holds(self, vault: Vault, temporary: Path) -> None:
        held, dead = (temporary / f"pipevault-build-{digit * 32}" for digit in "ab")
        lone = temporary / f"pipevault-graphs-{'c' * 32}.lock"
        for folder in (held, dead):
            folder.mkdir()
            folder.with_name(f"{folder.name}.lock").touch()
        lone.touch()
        lock = try_lock(held.with_name(f"{held.name}.lock"))
        assert isinstance(lock, HeldLock)
        expected = [dead.name, f"{dead.name}.lock", lone.name]
        assert names(find_leftovers(vault.layout, temporary_dir=temporary)) == expected
        assert names(sweep(vault.layout, temporary_dir=temporary)) == expected
        assert sorted(path.name for path in temporary.iterdir()) == [held.name, f"{held.name}.lock"]
        lock.release()
        assert len(sweep(vault.layout, temporary_dir=temporary)) == 2

    @pytest.mark.parametrize(
        "name",
        [
            "pipevault-vault",
            "pipevault-freeze-my_vault",
            "pipevault-build-my_vault",
            f"pipevault-build-{'A' * 32}",
            f"pipevault-freeze-1-{'0' * 24}",
            f"prefix-pipevault-freeze-1-{'0' * 24}-abc",
        ],
    )
    def test_what_this_package_does_not_make_stays(self, vault: Vault, temporary: Path, name: str) -> None:
        (temporary / name).mkdir()
        make_older(temporary / name, OLD_S)
        assert sweep(vault.layout, temporary_dir=temporary) == []

    def test_other_users_folders_and_links_stay(self, vault: Vault, temporary: Path, tmp_path: Path) -> None:
        name = f"pipevault-freeze-{DEAD.pid}-{DEAD.mark}-"
        (temporary / f"{name}link").symlink_to(tmp_path)
        others = temporary / f"{name}other"
        others.mkdir()
        if os.geteuid() == 0:
            os.chown(others, 65534, 65534)
        else:
            others.rmdir()
        assert sweep(vault.layout, temporary_dir=temporary) == []

    def test_a_temporary_folder_that_is_absent(self, vault: Vault, tmp_path: Path) -> None:
        assert sweep(vault.layout, temporary_dir=tmp_path / "absent") == []


def test_a_look_changes_nothing_and_a_sweep_does_what_it_said(vault: Vault, entry: Entry, temporary: Path) -> None:
    vault.publish(entry.manifest, entry.files)
    add_staging(vault, DEAD)
    add_lock(vault, entry.key, note=DEAD)
    vault.layout.guard_file(entry.key).unlink()
    (temporary / f"pipevault-freeze-{DEAD.pid}-{DEAD.mark}-abc_1234").mkdir()

    def everything() -> list[Path]:
        return sorted([*vault.root.rglob("*"), *temporary.rglob("*")])

    before = everything()
    found = find_leftovers(vault.layout, temporary_dir=temporary)
    assert everything() == before
    guard = vault.layout.guard_file(entry.key)  # made for the sweep, and swept
    assert [item.path for item in sweep(vault.layout, temporary_dir=temporary) if item.path != guard] == [
        item.path for item in found
    ]
    assert len(found) == 4
    assert find_leftovers(vault.layout, temporary_dir=temporary) == ()


def test_what_may_not_be_removed_is_left_out(vault: Vault, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_staging(vault, DEAD)
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)
    assert sweep(vault.layout, temporary_dir=temporary) == []
    assert len(find_leftovers(vault.layout, temporary_dir=temporary)) == 1
