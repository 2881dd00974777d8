"""Counting: what is written, who folds it, and that nothing is lost or counted twice."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.fault_steps import killed_at_each_step
from helpers.mounts import in_child
from helpers.store_entries import Entry
from pipevault.digest import digest_bytes
from pipevault.errors import NewerVaultError, UnknownKeyError, VaultError
from pipevault.files.flock import NotLocked
from pipevault.store.layout import Layout
from pipevault.store.places import iter_foreign
from pipevault.store.stats import event_log
from pipevault.store.stats.event_log import state_layout
from pipevault.store.stats.summary import compact, count, find_entry, summary
from pipevault.store.vault import Vault

KEY, OTHER_KEY = digest_bytes(b"a"), digest_bytes(b"b")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def own_state_folder(tmp_path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # a test may undo what its own one did
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        yield
    for root in tuple(event_log._logs):
        event_log._forget(root)


def files(layout: Layout) -> list[Path]:
    """Without the lock."""
    found = layout.events_dir.iterdir() if layout.events_dir.exists() else []
    return sorted(path for path in found if path != layout.totals_lock)


def count_in_child(layout: Layout, hits: int = 1) -> None:
    """What a process counts that is dead afterwards."""

    def run() -> None:
        for _ in range(hits):
            count(layout, "hit", key=KEY)

    assert in_child(run) == 0


def hits(layout: Layout) -> int:
    return summary(layout).total.hits


class TestCounting:
    def test_each_event(self, vault: Vault) -> None:
        layout = vault.layout
        count(layout, "miss", key=KEY, reason="absent")
        count(layout, "compiled", key=KEY, seconds=62.5)
        count(layout, "published", key=KEY, bytes=1000)
        count(layout, "hit", key=KEY)
        count(layout, "saved", key=KEY, seconds=62.5)
        count(layout, "hit", key=OTHER_KEY)
        count(layout, "rebuilt", key=KEY)
        count(layout, "quarantined")
        count(layout, "miss", key=KEY, reason="absent")
        count(layout, "miss", key=KEY, reason="damaged")
        found = summary(layout)
        total = found.total
        assert (total.hits, total.misses, total.missed) == (2, {"absent": 2, "damaged": 1}, 3)
        assert (total.compiled, total.compile_s, total.saved_s) == (1, 62.5, 62.5)
        assert (total.rebuilt, total.quarantined, total.published, total.published_bytes) == (1, 1, 1, 1000)
        assert total.hit_rate == 0.4
        assert found.entries.keys() == {KEY, OTHER_KEY}
        assert found.entries[OTHER_KEY].hits == 1
        assert found.entries[KEY].quarantined == 0
        assert found.unreadable == ()
        assert found.since is not None

    def test_nothing_was_counted(self, vault: Vault) -> None:
        found = summary(vault.layout)
        assert (found.total.hit_rate, found.since, dict(found.entries)) == (None, None, {})
        assert files(vault.layout) == []

    def test_what_the_vault_holds(self, vault: Vault, entry: Entry) -> None:
        vault.publish(entry.manifest, entry.files)
        (vault.root / "entries" / "note.txt").write_text("foreign")
        found = summary(vault.layout)
        assert found.stored_entries == 1
        assert found.stored_bytes == entry.manifest.size_bytes + len(entry.manifest.to_bytes())

    def test_the_file_belongs_to_the_layout(self, vault: Vault) -> None:
        count_in_child(vault.layout)
        compact(vault.layout)
        count(vault.layout, "published")
        assert len(files(vault.layout)) == 2
        assert list(iter_foreign(vault.layout)) == []

    def test_it_is_written_at_once(self, vault: Vault) -> None:
        """A process that is killed, or that ends as forked children do, loses nothing."""
        count(vault.layout, "hit", key=KEY)
        count(vault.layout, "saved", key=KEY, seconds=1)
        [file] = files(vault.layout)
        assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["hit", "saved"]

    def test_a_forked_child_counts_in_the_file_of_its_parent(self, vault: Vault) -> None:
        count(vault.layout, "hit", key=KEY)
        count_in_child(vault.layout, hits=3)
        count(vault.layout, "hit", key=KEY)
        assert len(files(vault.layout)) == 1
        assert hits(vault.layout) == 5

    def test_the_file_of_a_parent_that_ended_is_not_folded_while_its_child_counts(self, vault: Vault) -> None:
        can_end, may_end = FORK.Event(), FORK.Event()

        def child() -> None:
            count(vault.layout, "hit")
            can_end.set()
            may_end.wait(60)
            count(vault.layout, "hit")

        def parent() -> None:
            count(vault.layout, "hit")
            if os.fork() == 0:
                child()
                os._exit(0)

        assert in_child(parent) == 0
        assert can_end.wait(60)
        assert compact(vault.layout) == 0
        may_end.set()
        while compact(vault.layout) == 0:
            pass
        assert hits(vault.layout) == 3

    def test_numbers_that_are_none_and_a_reason_that_is_no_word(self, vault: Vault) -> None:
        count(vault.layout, "compiled", seconds=float("nan"), bytes=-1)
        count(vault.layout, "compiled", seconds=float("inf"))
        count(vault.layout, "compiled", seconds=10**400)
        count(vault.layout, "miss", reason="no entry has this key; the nearest differs")
        count(vault.layout, "miss")
        total = summary(vault.layout).total
        assert (total.compiled, total.compile_s) == (3, 0)
        assert total.misses == {"other": 1, "unknown": 1}

    @pytest.mark.parametrize("event", ["", "Hit", "two words", "x" * 33, 'quote"', "line\nbreak"])
    def test_what_is_no_event_is_not_written(self, vault: Vault, event: str) -> None:
        count(vault.layout, event)
        count(vault.layout, "published")
        assert summary(vault.layout).unreadable == ()
        assert summary(vault.layout).total.published == 1

    def test_the_file_is_removed_meanwhile(self, vault: Vault) -> None:
        count(vault.layout, "published")
        files(vault.layout)[0].unlink()
        count(vault.layout, "published")
        assert summary(vault.layout).total.published == 1

    def test_a_descriptor_that_somebody_closed_is_not_written_to(self, vault: Vault, tmp_path: Path) -> None:
        count(vault.layout, "published")
        descriptor = event_log._logs[vault.root][0]
        with (tmp_path / "letter").open("w") as letter:
            os.dup2(letter.fileno(), descriptor)  # closes it; the number is the letter's now
            count(vault.layout, "published")
        os.close(descriptor)
        assert (tmp_path / "letter").read_text() == ""
        assert summary(vault.layout).total.published == 2

    def test_half_a_line_is_not_continued(self, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
        count(vault.layout, "published")
        monkeypatch.undo()
        count(vault.layout, "published")
        assert summary(vault.layout).total.published == 1
        assert summary(vault.layout).unreadable == ()


class TestNeverRaises:
    def test_no_vault(self, tmp_path: Path) -> None:
        layout = Layout(tmp_path / "none")
        count(layout, "miss", reason="absent")
        assert summary(layout).total.misses == {"absent": 1}
        assert not layout.root.exists()
        assert len(files(state_layout(layout))) == 1

    def test_the_first_miss_of_a_new_vault_is_counted(self, tmp_path: Path) -> None:
        layout = Layout(tmp_path / "none")
        count(layout, "miss", reason="absent")
        Vault.open(layout.root)
        count(layout, "published")
        assert summary(layout).total.misses == {"absent": 1}
        assert summary(layout).total.published == 1
        assert len(files(layout)) == 1

    def test_a_folder_of_others_stays_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "letters").mkdir()
        count(Layout(tmp_path / "letters"), "miss", reason="absent")
        assert list((tmp_path / "letters").iterdir()) == []

    @pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
    def test_a_vault_that_cannot_be_written(self, vault: Vault, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        opened = os.open

        def refuse(path: Any, *arguments: Any, **options: Any) -> int:
            if str(path).startswith(str(vault.layout.events_dir)):
                raise OSError(code, os.strerror(code))
            return opened(path, *arguments, **options)

        monkeypatch.setattr(os, "open", refuse)
        count(vault.layout, "published")
        count(vault.layout, "published")
        monkeypatch.undo()
        assert files(vault.layout) == []
        assert summary(vault.layout).total.published == 2
        assert len(files(state_layout(vault.layout))) == 1

    def test_no_place_at_all(self, vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
        shutil.rmtree(vault.root)
        count(vault.layout, "published")
        count(vault.layout, "published")
        assert not vault.root.exists()
        assert (tmp_path / "file").read_text() == ""

    def test_the_vault_is_deleted_while_in_use(self, vault: Vault) -> None:
        count(vault.layout, "published")
        shutil.rmtree(vault.root)
        count(vault.layout, "published")
        assert not vault.root.exists()
        assert summary(vault.layout).total.published == 1


class TestReading:
    def write(self, layout: Layout, text: bytes, pid: int = 1) -> Path:
        layout.events_dir.mkdir(exist_ok=True)
        path = layout.events_file(host="elsewhere", pid=pid, random_hex="0" * 16)
        path.write_bytes(text)
        return path

    def test_a_torn_last_line(self, vault: Vault) -> None:
        self.write(vault.layout, b'{"event":"hit","time":1}\n{"event":"hi')
        found = summary(vault.layout)
        assert (found.total.hits, found.unreadable) == (1, ())
        assert found.since == "1970-01-01T00:00:01+00:00"

    @pytest.mark.parametrize(
        "line",
        [
            b"no JSON",
            b"[]",
            b'{"event":1,"time":1}',
            b'{"event":"hit"}',
            b'{"event":"hit","time":"noon"}',
            b'{"event":"hit","key":"short","time":1}',
            b'{"event":"hit","key":7,"time":1}',
            b'{"event":"hit","reason":[],"time":1}',
            b'{"event":"hit","numbers":[1],"time":1}',
            b'{"event":"hit","numbers":{"seconds":"long"},"time":1}',
            b'{"event":"hit","numbers":{"seconds":-1},"time":1}',
            b'{"event":"hit","numbers":{"seconds":NaN},"time":1}',
            b"[" * 100_000,
            b"\xff\xfe",
        ],
    )
    def test_a_line_that_is_no_event(self, vault: Vault, line: bytes) -> None:
        self.write(vault.layout, b'{"event":"hit","time":1}\n' + line + b'\n{"event":"hit","time":1}\n')
        found = summary(vault.layout)
        assert found.total.hits == 2
        assert len(found.unreadable) == 1
        assert "1 lines" in found.unreadable[0]

    def test_an_event_of_a_later_version(self, vault: Vault) -> None:
        self.write(vault.layout, b'{"event":"teleported","time":1,"colour":"blue"}\n{"event":"hit","time":1}\n')
        assert summary(vault.layout).total.hits == 1

    def test_a_pipe_in_the_place_of_a_file(self, vault: Vault) -> None:
        path = self.write(vault.layout, b"")
        path.unlink()
        os.mkfifo(path)
        assert len(summary(vault.layout).unreadable) == 1

    def test_a_link_in_the_place_of_a_file(self, vault: Vault, tmp_path: Path) -> None:
        path = self.write(vault.layout, b"")
        path.unlink()
        (tmp_path / "secret").write_text('{"event":"hit","time":1}\n')
        path.symlink_to(tmp_path / "secret")
        found = summary(vault.layout)
        assert (found.total.hits, len(found.unreadable)) == (0, 1)

    def test_a_file_in_the_place_of_the_folder(self, vault: Vault) -> None:
        vault.layout.events_dir.write_text("")
        with pytest.raises(VaultError, match="events"):
            summary(vault.layout)
        count(vault.layout, "published")


class TestFolding:
    def test_dead_processes_are_folded_into_one_file(self, vault: Vault) -> None:
        for _ in range(3):
            count_in_child(vault.layout, hits=2)
        assert compact(vault.layout) == 3
        assert [file.name for file in files(vault.layout)] == ["totals.json"]
        assert hits(vault.layout) == 6
        count_in_child(vault.layout)
        compact(vault.layout)
        assert [file.name for file in files(vault.layout)] == ["totals.json"]
        assert hits(vault.layout) == 7

    def test_a_living_process_keeps_its_file(self, vault: Vault) -> None:
        count(vault.layout, "published")
        assert compact(vault.layout) == 0
        count(vault.layout, "published")
        assert summary(vault.layout).total.published == 2

    def test_nothing_to_fold_writes_nothing(self, vault: Vault) -> None:
        compact(vault.layout)
        assert files(vault.layout) == []
        count_in_child(vault.layout)
        compact(vault.layout)
        compact(vault.layout)
        assert [file.name for file in files(vault.layout)] == ["totals.json"]

    def test_a_file_without_locks_is_folded_once_it_lay_idle(
        self, vault: Vault, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        count_in_child(vault.layout)
        monkeypatch.setattr(event_log, "try_own", lambda _: NotLocked.NO_LOCKS)
        assert compact(vault.layout) == 0
        os.utime(files(vault.layout)[0], (1, 1))
        assert compact(vault.layout) == 1
        assert hits(vault.layout) == 1

    def test_an_ended_process_of_another_host_or_container_is_folded_at_once(self, vault: Vault) -> None:
        vault.layout.events_dir.mkdir()
        path = vault.layout.events_file(host="elsewhere", pid=1, random_hex="0" * 16)
        path.write_bytes(b'{"event":"hit","time":1}\n')
        assert compact(vault.layout) == 1
        assert hits(vault.layout) == 1

    def test_a_file_that_was_folded_while_its_process_lives_is_not_written_to_again(self, vault: Vault) -> None:
        count(vault.layout, "published")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(event_log, "try_own", lambda _: None)
            assert compact(vault.layout) == 1
        count(vault.layout, "published")
        assert summary(vault.layout).total.published == 2

    def test_many_processes_leave_few_files(self, vault: Vault) -> None:
        for number in range(3 * event_log.FOLD_EVERY):
            vault.layout.events_dir.mkdir(exist_ok=True)
            event_log._forget(vault.root)
            count(vault.layout, "published", key=KEY, bytes=number)
            assert len(files(vault.layout)) <= event_log.FOLD_EVERY
        assert summary(vault.layout).total.published == 3 * event_log.FOLD_EVERY

    def test_a_large_file_is_left_for_a_new_one(self, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(event_log, "LARGEST_FILE_BYTES", 50)
        for _ in range(5):
            count(vault.layout, "published")
        assert len(files(vault.layout)) == 3
        assert summary(vault.layout).total.published == 5

    def test_what_went_to_the_state_folder_is_folded_there(self, vault: Vault, tmp_path: Path) -> None:
        layout = Layout(tmp_path / "none")
        count_in_child(layout, hits=2)
        count_in_child(layout)
        assert compact(layout) == 2
        assert [file.name for file in files(state_layout(layout))] == ["totals.json"]
        assert hits(layout) == 3

    def test_killed_at_each_step(self, vault: Vault, tmp_path: Path) -> None:
        """Some counts may be lost; none is doubled, and what is left is what is folded later."""
        count_in_child(vault.layout, hits=6)
        compact(vault.layout)
        count_in_child(vault.layout, hits=4)
        count_in_child(vault.layout, hits=5)
        target = Layout(tmp_path / "target")
        shutil.copytree(vault.root, target.root)
        seen = []
        for _ in killed_at_each_step(lambda: compact(target)):
            seen.append(hits(target))
            compact(target)
            assert hits(target) == seen[-1]
            assert [file.suffix for file in files(target)] == [".json"]
            shutil.rmtree(target.root)
            shutil.copytree(vault.root, target.root)
        assert set(seen) <= {6, 10, 11, 15}
        assert (seen[0], seen[-1]) == (15, 15)
        assert len(seen) > 8

    def test_the_disk_fills_up(self, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
        count_in_child(vault.layout)
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(VaultError, match="full"):
            compact(vault.layout)
        monkeypatch.undo()
        assert hits(vault.layout) == 1
        assert list(vault.layout.tmp_dir.iterdir()) == []

    def test_processes_that_fold_while_others_count(self, vault: Vault) -> None:
        workers, rounds = 3, 12

        def work() -> None:
            for _ in range(rounds):
                count_in_child(vault.layout)
                compact(vault.layout)

        processes = [FORK.Process(target=work) for _ in range(workers)]
        for process in processes:
            process.start()
        seen = [0]
        while any(process.is_alive() for process in processes):
            seen.append(hits(vault.layout))
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * workers
        assert seen == sorted(seen)
        assert hits(vault.layout) == workers * rounds
        compact(vault.layout)
        assert hits(vault.layout) == workers * rounds
        assert [file.suffix for file in files(vault.layout)] == [".json"]

    @pytest.mark.parametrize(
        "damage",
        [
            b"",
            b"no JSON",
            b"{}",
            b"[]",
            b'{"totals_version":"1"}',
            b'{"rows":[[]],"since":1,"totals_version":2}',
            b'{"rows":[["","hit","",{"times":-1}]],"since":1,"totals_version":2}',
        ],
    )
    def test_damaged_totals_are_told_of_and_replaced(self, vault: Vault, damage: bytes) -> None:
        count_in_child(vault.layout)
        compact(vault.layout)
        vault.layout.totals_file.write_bytes(damage)
        count_in_child(vault.layout, hits=2)
        found = summary(vault.layout)
        assert found.total.hits == 2
        assert "totals.json is damaged" in found.unreadable[0]
        compact(vault.layout)
        assert summary(vault.layout).unreadable == ()
        assert hits(vault.layout) == 2

    def test_a_folder_in_place_of_totals_costs_no_count(self, vault: Vault) -> None:
        count_in_child(vault.layout)
        vault.layout.totals_file.mkdir()
        with pytest.raises(VaultError, match="regular file"):
            compact(vault.layout)
        assert hits(vault.layout) == 1
        assert "totals.json cannot be read" in summary(vault.layout).unreadable[0]

    def test_totals_of_a_later_version(self, vault: Vault) -> None:
        count_in_child(vault.layout)
        vault.layout.totals_file.write_text('{"totals_version": 3}')
        for function in (summary, compact):
            with pytest.raises(NewerVaultError, match="Upgrade"):
                function(vault.layout)
        assert len(files(vault.layout)) == 2


class TestFindingAnEntry:
    def test_of_the_vault_and_of_the_counted(self, vault: Vault, entry: Entry) -> None:
        vault.publish(entry.manifest, entry.files)
        count(vault.layout, "published", key=KEY)
        found = summary(vault.layout)
        assert find_entry(vault.layout, found, entry.key.hex[:6].upper()) == entry.key
        assert find_entry(vault.layout, found, KEY.short) == KEY

    @pytest.mark.parametrize("prefix", ["", "zz", "0" * 64])
    def test_unknown(self, vault: Vault, prefix: str) -> None:
        with pytest.raises(UnknownKeyError, match=r"No entry|is not a key"):
            find_entry(vault.layout, summary(vault.layout), prefix)

    def test_ambiguous(self, vault: Vault) -> None:
        keys = sorted(digest_bytes(bytes([number])) for number in range(40))
        first, second = next((a, b) for a, b in itertools.pairwise(keys) if a.hex[0] == b.hex[0])
        for key in (first, second):
            count(vault.layout, "published", key=key)
        with pytest.raises(UnknownKeyError, match="Give more digits") as caught:
            find_entry(vault.layout, summary(vault.layout), first.hex[0])
        assert caught.value.candidates == (first.hex, second.hex)


def test_a_lock_that_fails_for_an_unforeseen_reason_loses_no_events(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("pipevault.files.flock.fcntl.flock", fail)
    opened = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        count(vault.layout, "hit", key=KEY)
    assert len(os.listdir("/proc/self/fd")) == opened + 1
    [file] = files(vault.layout)
    assert len(file.read_bytes().splitlines()) == 5
