"""What dead processes left is swept, and nothing of a process that lives or may live."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.mounts import in_child
from helpers.store_entries import Entry, leftovers
from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.errors import LockTimeoutError
from pipevault.files import claims
from pipevault.files.flock import HeldLock, try_lock
from pipevault.files.heartbeat import BEAT_LIMIT_S
from pipevault.files.liveness import ProcessIdentity
from pipevault.files.scratch import scratch_folder
from pipevault.store.retention import leftovers as leftovers_module
from pipevault.store.retention.leftovers import LOCK_MIN_AGE_S, TIDY_ABOVE, Leftover, find_leftovers, sweep, tidy
from pipevault.store.vault import Vault

KEY = digest_bytes(b"key")
HERE = ProcessIdentity.current()
DEAD = replace(HERE, started=1)
"""This process's number, used before by a process that ended."""
ELSEWHERE = replace(HERE, host="elsewhere")
OLD_S = 10.0 + LOCK_MIN_AGE_S

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the file system one of the network, on which locks prove nothing."""
    monkeypatch.setattr(claims, "is_local", lambda descriptor: False)


def sweep_at(now_s: float, vault: Vault, temporary: Path) -> list[Leftover]:
    """Sweep when the clock tells ``now_s``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leftovers_module, "time", SimpleNamespace(time=lambda: now_s))
        return sweep(vault.layout, temporary_dir=temporary)


def add_staging(vault: Vault, *, mark: str = "") -> Path:
    """A folder that nobody has locked; ``mark``: as earlier releases made it."""
    folder = vault.layout.tmp_dir / ".".join(filter(None, ("elsewhere", "1", mark, os.urandom(8).hex())))
    folder.mkdir(parents=True)
    (folder / "artifact").write_bytes(b"x" * 100)
    return folder


def add_scratch(temporary: Path, purpose: str = "build") -> Path:
    folder = temporary / f"pipevault.{purpose}.{os.urandom(16).hex()}"
    folder.mkdir()
    (folder / "graph.so").write_bytes(b"x" * 9)
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
    folder = add_scratch(temporary)
    assert folder in [item.path for item in sweep(vault.layout)]


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
            assert sweep_at(time.time() + 1e9, vault, temporary) == []
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
        assert sweep_at(time.time() + 1e9, vault, temporary) == []
        assert folder.exists()
        process.kill()
        process.wait()
        assert names(sweep(vault.layout, temporary_dir=temporary)) == [folder.name]
        process.communicate()

    def test_of_another_container_goes_at_once(self, vault: Vault, temporary: Path) -> None:
        folder = add_staging(vault)
        assert names(sweep(vault.layout, temporary_dir=temporary)) == [folder.name]

    @pytest.mark.parametrize("mark", ["", "0" * 24])
    def test_where_locks_prove_nothing_its_age_decides(
        self, vault: Vault, temporary: Path, monkeypatch: pytest.MonkeyPatch, mark: str
    ) -> None:
        far(monkeypatch)
        young, old, ahead = (add_staging(vault, mark=mark) for _ in range(3))
        make_older(young, BEAT_LIMIT_S - 60)
        make_older(old, BEAT_LIMIT_S + 60)
        make_older(ahead, 60 - BEAT_LIMIT_S)
        assert names(sweep(vault.layout, temporary_dir=temporary)) == [old.name]
        assert young.exists()
        assert ahead.exists()

    def test_of_an_earlier_release_which_locked_none_its_age_decides(self, vault: Vault, temporary: Path) -> None:
        young, old = (add_staging(vault, mark=HERE.mark) for _ in range(2))
        make_older(old, BEAT_LIMIT_S + 60)
        assert names(sweep(vault.layout, temporary_dir=temporary)) == [old.name]
        assert young.exists()

    def test_foreign_files_and_links_stay(self, vault: Vault, temporary: Path, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.mkdir()
        (target / "precious").write_bytes(b"x")
        vault.layout.tmp_dir.mkdir(exist_ok=True)
        (vault.layout.tmp_dir / "notes.txt").write_bytes(b"x")
        vault.layout.staging_dir(host="h", pid=1, random_hex="0" * 16).symlink_to(target)
        folder = add_staging(vault)
        (folder / "link").symlink_to(target)
        assert names(sweep(vault.layout, temporary_dir=temporary)) == [folder.name]
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
        assert len(sweep_at(now_s, vault, temporary)) == 2

    def test_that_is_held_stays(self, vault: Vault, entry: Entry, temporary: Path) -> None:
        vault.publish(entry.manifest, entry.files)
        with vault.lock(entry.key, timeout_s=0):
            assert sweep_at(time.time() + 1e9, vault, temporary) == []
            assert vault.layout.holder_file(entry.key).exists()
            with pytest.raises(LockTimeoutError), vault.lock(entry.key, timeout_s=0):
                pytest.fail("two holders")

    def test_that_a_dead_process_left_held_keeps_its_note(self, vault: Vault, temporary: Path) -> None:
        """Without the note, nobody could take the lock over."""
        add_lock(vault, note=DEAD)
        held = try_lock(vault.layout.lock_file(KEY))
        assert isinstance(held, HeldLock)
        assert sweep_at(time.time() + 1e9, vault, temporary) == []
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
    def test_the_note_of_whoever_has_not_the_lock_goes(
        self, vault: Vault, temporary: Path, note: ProcessIdentity
    ) -> None:
        add_lock(vault, note=note)
        assert names(sweep(vault.layout, temporary_dir=temporary)) == [vault.layout.holder_file(KEY).name]

    def test_where_locks_prove_nothing_a_note_stays_while_it_shows_life(
        self, vault: Vault, temporary: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        far(monkeypatch)
        add_lock(vault, note=ELSEWHERE)
        assert sweep(vault.layout, temporary_dir=temporary) == []
        make_older(vault.layout.holder_file(KEY), BEAT_LIMIT_S + 60)
        assert names(sweep(vault.layout, temporary_dir=temporary)) == [vault.layout.holder_file(KEY).name]

    def test_foreign_files_stay(self, vault: Vault, temporary: Path) -> None:
        vault.layout.locks_dir.mkdir()
        (vault.layout.locks_dir / "notes.lock").touch()
        assert sweep_at(time.time() + 1e9, vault, temporary) == []

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
    @pytest.mark.parametrize("purpose", ["build", "graphs", "unstored", "compare", "golden"])
    def test_folders_of_a_dead_process(
        self, vault: Vault, temporary: Path, purpose: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        with scratch_folder(purpose) as alive:
            dead = add_scratch(temporary, purpose)
            [item] = sweep_at(time.time() + 1e9, vault, temporary)
            assert (item.path, item.size_bytes) == (dead, 9)
            assert alive.exists()

    @pytest.mark.parametrize(
        "name",
        [
            "pipevault.vault",
            "pipevault.build.my_vault",
            f"pipevault.build.{'A' * 32}",
            f"pipevault-build-{'a' * 32}",
            f"prefix.pipevault.build.{'a' * 32}",
        ],
    )
    def test_what_this_package_does_not_make_stays(self, vault: Vault, temporary: Path, name: str) -> None:
        (temporary / name).mkdir()
        make_older(temporary / name, OLD_S)
        assert sweep(vault.layout, temporary_dir=temporary) == []

    def test_other_users_folders_and_links_stay(self, vault: Vault, temporary: Path, tmp_path: Path) -> None:
        (temporary / f"pipevault.build.{'a' * 32}").symlink_to(tmp_path)
        others = add_scratch(temporary)
        if os.geteuid() == 0:
            os.chown(others, 65534, 65534)
        else:
            (others / "graph.so").unlink()
            others.rmdir()
        assert sweep(vault.layout, temporary_dir=temporary) == []

    def test_a_temporary_folder_that_is_absent(self, vault: Vault, tmp_path: Path) -> None:
        assert sweep(vault.layout, temporary_dir=tmp_path / "absent") == []


class TestTidying:
    @pytest.mark.parametrize("folder", ["leases", "tmp", "locks"])
    def test_what_killed_processes_leave_stays_bounded(self, vault: Vault, entry: Entry, folder: str) -> None:
        layout, most = vault.layout, 0
        for number in range(600):
            tidy(layout)
            if folder == "leases":
                layout.leases_dir.mkdir(exist_ok=True)
                layout.lease_file(KEY, host="c", pid=1, random_hex=f"{number:016x}").touch()
            elif folder == "tmp":
                add_staging(vault)
            else:
                add_lock(vault, digest_bytes(b"%d" % number), note=ELSEWHERE)
                make_older(layout.locks_dir, OLD_S)
            most = max(most, len(list((vault.root / folder).iterdir())))
        assert TIDY_ABOVE <= most <= TIDY_ABOVE + 6

    def test_a_few_files_are_left_alone(self, vault: Vault) -> None:
        add_staging(vault)
        tidy(vault.layout)
        assert len(leftovers(vault)) == 2  # the folder and its file

    def test_it_never_raises(self, vault: Vault) -> None:
        vault.layout.leases_dir.write_text("no folder")
        tidy(vault.layout)
        assert vault.layout.leases_dir.read_text() == "no folder"


def test_a_look_changes_nothing_and_a_sweep_does_what_it_said(vault: Vault, entry: Entry, temporary: Path) -> None:
    vault.publish(entry.manifest, entry.files)
    add_staging(vault)
    add_lock(vault, entry.key, note=DEAD)
    vault.layout.guard_file(entry.key).unlink()
    add_scratch(temporary)

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
    add_staging(vault)
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)
    assert sweep(vault.layout, temporary_dir=temporary) == []
    assert len(find_leftovers(vault.layout, temporary_dir=temporary)) == 1
