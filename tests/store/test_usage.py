"""Noting the last use of an entry, in the vault and beside it, and what clocks that disagree make of it."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipevault.digest import Digest, digest_bytes
from pipevault.store.places import iter_foreign
from pipevault.store.retention.prune import CLOCK_TOLERANCE_S, judge
from pipevault.store.retention.usage import forget_use, last_use_s, last_uses_s, record_use, set_last_use
from pipevault.store.vault import Vault

KEY, OTHER = digest_bytes(b"key"), digest_bytes(b"other")
NOW = 1_800_000_000.0
DAY = 86_400.0


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def noted(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class TestRecording:
    def test_no_use(self, vault: Vault) -> None:
        assert last_use_s(vault.layout, KEY) is None
        assert last_uses_s(vault.layout) == {}

    def test_the_first_use_makes_an_empty_file_of_the_layout(self, vault: Vault, state: Path) -> None:
        vault.record_use(KEY)
        assert vault.layout.use_file(KEY).read_bytes() == b""
        assert list(iter_foreign(vault.layout)) == []
        assert not state.exists()

    def test_a_later_use_moves_the_time_forward(self, vault: Vault) -> None:
        vault.record_use(KEY)
        os.utime(vault.layout.use_file(KEY), times=(NOW - 1e9, NOW - 1e9))
        before = time.time() - 1
        vault.record_use(KEY)
        used = last_use_s(vault.layout, KEY)
        assert used is not None
        assert before <= used

    def test_a_clock_that_is_behind_does_not_make_it_look_older(self, vault: Vault) -> None:
        vault.record_use(KEY)
        ahead = time.time() + DAY
        os.utime(vault.layout.use_file(KEY), times=(ahead, ahead))
        vault.record_use(KEY)
        assert last_use_s(vault.layout, KEY) == pytest.approx(ahead, abs=1e-3)

    @pytest.mark.parametrize("modified_s", [0.0, -1e6, NOW + 1e9])
    def test_times_from_anywhere_are_read(self, vault: Vault, modified_s: float) -> None:
        vault.record_use(KEY)
        set_last_use(vault.layout, KEY, modified_s)
        assert last_use_s(vault.layout, KEY) == modified_s
        assert last_uses_s(vault.layout) == {KEY: modified_s}

    def test_forgotten(self, vault: Vault, state: Path) -> None:
        vault.record_use(KEY)
        replace(vault, writable=False).record_use(KEY)
        forget_use(vault.layout, KEY)
        forget_use(vault.layout, KEY)
        assert last_use_s(vault.layout, KEY) is None
        assert noted(state) == []


class TestReadOnly:
    def test_the_note_goes_to_the_state_folder_and_is_read_back(self, vault: Vault, state: Path) -> None:
        replace(vault, writable=False).record_use(KEY)
        assert not vault.layout.uses_dir.exists()
        assert [path.name for path in noted(state)] == [KEY.hex]
        used = last_use_s(vault.layout, KEY)
        assert used is not None
        assert last_uses_s(vault.layout) == {KEY: used}

    def test_the_later_of_both_places_counts(self, vault: Vault, state: Path) -> None:
        vault.record_use(KEY)
        replace(vault, writable=False).record_use(KEY)
        [note] = noted(state)
        for in_vault, in_state in ((NOW, NOW - 9), (NOW - 9, NOW)):
            os.utime(vault.layout.use_file(KEY), times=(in_vault, in_vault))
            os.utime(note, times=(in_state, in_state))
            assert last_use_s(vault.layout, KEY) == NOW
            assert last_uses_s(vault.layout) == {KEY: NOW}

    def test_two_vaults_have_notes_of_their_own(self, vault: Vault, tmp_path: Path) -> None:
        other = Vault.open(tmp_path / "other")
        replace(vault, writable=False).record_use(KEY)
        assert last_use_s(other.layout, KEY) is None

    def test_a_vault_that_became_read_only(self, vault: Vault, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        vault.layout.uses_dir.write_text("a file where the folder should be")
        vault.record_use(KEY)
        assert [path.name for path in noted(state)] == [KEY.hex]

    def test_another_users_note_in_a_shared_folder_is_replaced(
        self, vault: Vault, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vault.record_use(KEY)
        file = vault.layout.use_file(KEY)
        os.utime(file, times=(NOW - 1e9, NOW - 1e9))

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError

        monkeypatch.setattr(os, "utime", refuse)
        vault.record_use(KEY)
        assert file.stat().st_mtime > NOW - 1e8


class TestNeverRaises:
    def test_neither_place_can_be_written(self, vault: Vault, state: Path) -> None:
        vault.layout.uses_dir.write_text("")
        state.write_text("")
        vault.record_use(KEY)
        assert last_use_s(vault.layout, KEY) is None
        assert last_uses_s(vault.layout) == {}

    def test_a_user_without_a_home(self, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> Path:
            raise RuntimeError("no home")

        monkeypatch.setattr("platformdirs.user_state_path", fail)
        replace(vault, writable=False).record_use(KEY)
        forget_use(vault.layout, KEY)
        assert last_uses_s(vault.layout) == {}

    def test_the_vault_is_gone(self, vault: Vault, tmp_path: Path) -> None:
        vault.root.rename(tmp_path / "elsewhere")
        record_use(vault.layout, KEY)
        assert last_use_s(vault.layout, KEY) is not None

    def test_foreign_files_are_no_uses(self, vault: Vault) -> None:
        vault.record_use(KEY)
        (vault.layout.uses_dir / "notes.txt").write_text("")
        (vault.layout.use_file(KEY).parent / "notes.txt").write_text("")
        (vault.layout.use_file(KEY).parent / OTHER.hex).write_text("")
        assert list(last_uses_s(vault.layout)) == [KEY]


def keys(number: int) -> list[Digest]:
    return [digest_bytes(str(index).encode()) for index in range(number)]


class TestAging:
    def test_least_recently_used_first_and_publication_counts_where_no_use_is_known(self) -> None:
        old, middle, new = keys(3)
        published = {new: 0.0, old: NOW - 30, middle: NOW - 99}
        ages = judge(published, {new: NOW - 1, middle: NOW - 20, digest_bytes(b"gone"): NOW}, NOW)
        assert ages.order == (old, middle, new)
        assert ages.age_s == {old: 30.0, middle: 20.0, new: 1.0}
        assert not ages.clock_is_behind

    def test_a_use_before_the_publication_does_not_count(self) -> None:
        [key] = keys(1)
        assert judge({key: NOW - 5}, {key: NOW - 50}, NOW).age_s[key] == 5.0

    def test_a_note_from_the_future_is_neither_first_nor_of_negative_age(self) -> None:
        ahead, *others = keys(4)
        used = {ahead: NOW + 3650 * DAY, **{key: NOW - index for index, key in enumerate(others)}}
        ages = judge(dict.fromkeys(used, NOW - 100), used, NOW)
        assert ages.order[-1] == ahead
        assert ages.ahead == (ahead,)
        assert ages.age_s[ahead] == 0.0

    def test_it_ages_once_it_was_set_to_now(self) -> None:
        ahead, other = keys(2)
        used = {ahead: NOW, other: NOW + 50}
        later = judge(dict.fromkeys(used, NOW - 200), used, NOW + 100)
        assert later.order == (ahead, other)
        assert later.ahead == ()

    def test_several_from_the_future_keep_their_own_order(self) -> None:
        first, second, *others = keys(8)
        used = {**dict.fromkeys(others, NOW - 1), second: NOW + 2 * DAY, first: NOW + DAY}
        ages = judge(dict.fromkeys(used, NOW - 100), used, NOW)
        assert ages.order[-2:] == (first, second)

    def test_a_clock_that_went_back_gives_no_ages_and_the_order_of_the_times(self) -> None:
        first, second, third = keys(3)
        used = {third: NOW + 30, first: NOW + 10, second: NOW + 20}
        ages = judge(dict.fromkeys(used, NOW), used, NOW - 365 * DAY)
        assert ages.clock_is_behind
        assert ages.order == (first, second, third)
        assert set(ages.age_s.values()) == {0.0}
        assert ages.ahead == ()

    def test_clocks_a_little_apart_are_equal(self) -> None:
        [key] = keys(1)
        ages = judge({key: NOW + CLOCK_TOLERANCE_S}, {key: NOW + CLOCK_TOLERANCE_S}, NOW)
        assert (ages.clock_is_behind, ages.ahead, ages.age_s[key]) == (False, (), 0.0)

    def test_no_entries(self) -> None:
        ages = judge({}, {}, NOW)
        assert (ages.order, ages.clock_is_behind) == ((), False)


def test_a_folder_of_notes_that_cannot_be_read_hides_no_others(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in (KEY, OTHER):
        vault.record_use(key)
    closed = str(vault.layout.use_file(KEY).parent)
    scandir = os.scandir

    def refuse(path: str | Path) -> Any:
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scandir(path)

    monkeypatch.setattr("pipevault.store.places.os.scandir", refuse)
    assert set(last_uses_s(vault.layout)) == {OTHER}
