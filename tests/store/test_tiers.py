"""Several vaults searched in order: what is found where, copied, refused, too slow or broken."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.fault_steps import disk_full, strike_at
from helpers.mounts import silent, with_own_tmpfs
from helpers.store_entries import Entry, leftovers, make_entry, make_graph, read_artifacts, search, whole
from pipevault.errors import (
    CorruptEntryError,
    KeyFileError,
    NewerVaultError,
    NotAVaultError,
    SignatureError,
    SlowTierError,
    UnsafeVaultError,
    VaultError,
    VaultFullError,
    VaultNotWritableError,
)
from pipevault.settings import Settings, Tier
from pipevault.store import marker
from pipevault.store.tiers import Refused, TierHit, Tiers, deadline, open_vault, search_order
from pipevault.store.tiers.deadline import RETRY_AFTER_S, ask, left_out_s
from pipevault.store.trust.signing_keys import read_private_key, write_key_pair
from pipevault.store.vault import Vault

SHORT_S = 0.2
POLICIES = ("off", "warn", "require")


@pytest.fixture
def local(tmp_path: Path) -> Vault:
    return Vault.open(tmp_path / "local")


@pytest.fixture
def shared(tmp_path: Path, entry: Entry) -> Vault:
    """Holds the entry."""
    vault = Vault.open(tmp_path / "shared")
    vault.publish(entry.manifest, entry.files)
    return vault


@pytest.fixture
def silent_vault(tmp_path: Path) -> Iterator[Path]:
    with silent(tmp_path / "silent"):
        yield tmp_path / "silent"


def open_tiers(local: Path, *others: Path | Tier, **options: Any) -> Tiers:
    tiers = tuple(other if isinstance(other, Tier) else Tier(other) for other in others)
    return Tiers(Settings(local, tiers=tiers, **options))


def found_in(tiers: Tiers, entry: Entry) -> TierHit:
    found = tiers.lookup(entry.key)
    assert found is not None
    return found


class TestOrder:
    def test_dir_comes_first_unless_it_is_one_of_the_tiers(self, tmp_path: Path) -> None:
        a, b = Tier(tmp_path / "a"), Tier(tmp_path / "b")
        assert search_order(Settings(tmp_path / "dir", tiers=(a, b))) == (Tier(tmp_path / "dir"), a, b)
        assert search_order(Settings(tmp_path / "b", tiers=(a, b))) == (a, b)
        assert search_order(Settings(tmp_path / "x" / ".." / "b", tiers=(a, b))) == (a, b)
        assert search_order(Settings(tmp_path / "dir")) == (Tier(tmp_path / "dir"),)

    def test_the_nearest_tier_that_has_it_gives_it(self, local: Vault, shared: Vault, entry: Entry) -> None:
        tiers = open_tiers(local.root, shared.root)
        assert found_in(tiers, entry).vault.root == shared.root
        local.publish(entry.manifest, entry.files)
        assert found_in(tiers, entry).vault.root == local.root

    def test_a_tier_behind_the_one_that_has_it_is_not_asked(
        self, shared: Vault, silent_vault: Path, entry: Entry
    ) -> None:
        found, problems = search(open_tiers(shared.root, silent_vault), entry.key)
        assert found is not None
        assert (found.tier.dir, problems) == (shared.root, [])

    def test_nothing_anywhere(self, local: Vault, tmp_path: Path, entry: Entry) -> None:
        Vault.open(tmp_path / "empty")
        tiers = open_tiers(local.root, tmp_path / "empty")
        assert search(tiers, entry.key) == (None, [])

    def test_a_vault_of_its_own_that_does_not_exist_is_not_made(self, shared: Vault, entry: Entry) -> None:
        own = shared.root.parent / "own"
        assert found_in(open_tiers(own, shared.root), entry).tier.dir == shared.root
        assert not own.exists()

    def test_a_vault_that_another_process_makes_at_the_same_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = Vault.open
        steps = iter([lambda: (tmp_path / "own" / "tmp").mkdir(parents=True), lambda: real(tmp_path / "own")])

        def overtaken(root: Path, **options: Any) -> Vault:
            try:
                return real(root, **options)
            finally:
                next(steps, lambda: None)()  # type: ignore[no-untyped-call]

        monkeypatch.setattr(Vault, "open", overtaken)
        assert open_vault(Settings(tmp_path / "own"), create=False) is None
        assert open_vault(Settings(tmp_path / "own"), create=False) is not None

    def test_all_entries_tier_by_tier(self, local: Vault, shared: Vault, entry: Entry, tmp_path: Path) -> None:
        other = make_entry(tmp_path / "source", "b", {"x": b"x"})
        local.publish(other.manifest, other.files)
        tiers = open_tiers(local.root, tmp_path / "nothing", shared.root)
        assert list(tiers.newest(10)) == [other.manifest, entry.manifest]


class TestShelf:
    @pytest.fixture
    def graphs(self, tmp_path: Path) -> list[Entry]:
        """Of one part, sorted by key."""
        made = (make_graph(tmp_path / "source", "unet", text) for text in "123")
        return sorted(made, key=lambda entry: entry.key)

    def test_the_keys_of_all_tiers_nearest_first_and_none_twice(
        self, local: Vault, shared: Vault, graphs: list[Entry], tmp_path: Path
    ) -> None:
        last = Vault.open(tmp_path / "last")
        for vault, published in ((local, graphs[2:]), (shared, graphs[1:]), (last, graphs)):
            for graph in published:
                vault.publish(graph.manifest, graph.files)
        tiers = open_tiers(local.root, shared.root, last.root)
        shelf = graphs[0].manifest.key.shelf
        assert tiers.shelf(shelf) == ((graphs[2].key, graphs[1].key, graphs[0].key), ())
        found = [manifest.key.digest for manifest in tiers.newest(10, shelf)]
        by_tier = [found[:1], sorted(found[1:3]), sorted(found[3:])]
        assert by_tier == [[graph.key for graph in graphs[start:]] for start in (2, 1, 0)]

    def test_what_is_broken_or_slow_is_told_of_and_passed_over(
        self, local: Vault, shared: Vault, silent_vault: Path, graphs: list[Entry], tmp_path: Path
    ) -> None:
        shared.publish(graphs[0].manifest, graphs[0].files)
        (tmp_path / "file").write_text("")
        gone = tmp_path / "gone"
        tiers = open_tiers(local.root, silent_vault, tmp_path / "file", gone, shared.root, tier_timeout_s=SHORT_S)
        shelf = graphs[0].manifest.key.shelf
        keys, problems = tiers.shelf(shelf)
        assert keys == (graphs[0].key,)
        assert [problem.partition(":")[0] for problem in problems] == [
            f"tier {folder}" for folder in (silent_vault, tmp_path / "file", gone)
        ]
        assert list(tiers.newest(10, shelf)) == [graphs[0].manifest]

    def test_a_tier_that_went_away_is_no_empty_shelf(self, local: Vault, shared: Vault, graphs: list[Entry]) -> None:
        tiers = open_tiers(local.root, shared.root)
        shelf = graphs[0].manifest.key.shelf
        assert tiers.shelf(shelf) == ((), ())
        shared.root.rename(shared.root.with_name("away"))
        assert len(tiers.shelf(shelf)[1]) == 1

    def test_an_own_vault_that_does_not_exist_is_not_made(self, tmp_path: Path, graphs: list[Entry]) -> None:
        assert open_tiers(tmp_path / "own").shelf(graphs[0].manifest.key.shelf) == ((), ())
        assert not (tmp_path / "own").exists()


class TestCopying:
    def test_a_hit_is_copied_verified_to_the_first_tier_that_can_be_written(
        self, local: Vault, shared: Vault, entry: Entry, tmp_path: Path
    ) -> None:
        Vault.open(tmp_path / "between")
        tiers = open_tiers(local.root, tmp_path / "between", shared.root)
        copied = tiers.copy_nearer(found_in(tiers, entry))
        assert (copied.vault.root, copied.tier.dir, copied.origin.dir) == (local.root, local.root, shared.root)
        assert whole(local, entry.manifest)
        assert not list(Vault.open(tmp_path / "between").manifests())
        assert found_in(tiers, entry).tier.dir == local.root
        assert leftovers(local) == []

    def test_a_vault_of_its_own_is_made_for_the_copy(self, shared: Vault, entry: Entry) -> None:
        own = shared.root.parent / "own"
        tiers = open_tiers(own, shared.root)
        tiers.copy_nearer(found_in(tiers, entry))
        assert whole(Vault.open(own, create=False), entry.manifest)

    def test_a_tier_that_is_not_the_own_one_takes_a_copy_once_it_was_asked(
        self, local: Vault, shared: Vault, entry: Entry, tmp_path: Path
    ) -> None:
        near = Vault.open(tmp_path / "near")
        tiers = open_tiers(local.root, near.root, shared.root, local.root)  # the own vault comes last
        found = found_in(tiers, entry)
        fresh = open_tiers(local.root, near.root, shared.root, local.root)
        assert fresh.copy_nearer(found) is found, "never asked: it may be one that never answers"
        let_go = threading.Event()
        with pytest.raises(SlowTierError):
            ask(near.root, let_go.wait, timeout_s=0)
        with pytest.raises(SlowTierError, match="is left out for"):
            tiers.copy_nearer(found)
        let_go.set()
        deadline._silent.pop(near.root)
        assert tiers.copy_nearer(found).tier.dir == near.root
        assert whole(near, entry.manifest)

    def test_an_own_vault_is_made_by_publishing_alone(self, tmp_path: Path, entry: Entry) -> None:
        tiers = open_tiers(tmp_path / "own")
        assert (tiers.is_writable(tiers.own_tier), list(tiers.newest(5))) == (False, [])
        assert not (tmp_path / "own").exists()
        assert tiers.publish(entry.manifest, entry.files).manifest == entry.manifest
        assert whole(Vault.open(tmp_path / "own", create=False), entry.manifest)

    def test_a_tier_that_cannot_be_written_is_passed_over(
        self, local: Vault, shared: Vault, entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Vault.open(tmp_path / "baked")
        monkeypatch.setattr("pipevault.store.vault.is_writable", lambda layout: layout.root.name != "baked")
        tiers = open_tiers(local.root, tmp_path / "baked", local.root, shared.root)
        assert tiers.copy_nearer(found_in(tiers, entry)).tier.dir == local.root

    def test_where_no_nearer_tier_can_be_written_nothing_is_copied(
        self, local: Vault, shared: Vault, entry: Entry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipevault.store.vault.is_writable", lambda layout: False)
        tiers = open_tiers(local.root, shared.root)
        found = found_in(tiers, entry)
        assert tiers.copy_nearer(found) is found

    def test_copying_can_be_switched_off(self, local: Vault, shared: Vault, entry: Entry) -> None:
        tiers = open_tiers(local.root, Tier(shared.root, copy=False))
        found = found_in(tiers, entry)
        assert tiers.copy_nearer(found) is found
        assert local.lookup(entry.key) is None

    def test_a_damaged_copy_is_replaced(self, local: Vault, shared: Vault, entry: Entry) -> None:
        local.publish(entry.manifest, entry.files)
        path = local.layout.artifact_file(entry.manifest.artifacts[0].digest)
        path.chmod(0o644)
        path.write_bytes(b"damaged")
        tiers = open_tiers(local.root, shared.root)
        first, second = [item for item in tiers.candidates(entry.key) if isinstance(item, TierHit)]
        with pytest.raises(CorruptEntryError):
            read_artifacts(tiers, first)
        read_artifacts(tiers, tiers.copy_nearer(second))
        assert whole(local, entry.manifest)

    def test_damaged_bytes_are_not_copied(self, local: Vault, shared: Vault, entry: Entry) -> None:
        path = shared.layout.artifact_file(entry.manifest.artifacts[0].digest)
        path.chmod(0o644)
        path.write_bytes(bytes(path.stat().st_size))
        tiers = open_tiers(local.root, shared.root)
        with pytest.raises(CorruptEntryError) as caught:
            tiers.copy_nearer(found_in(tiers, entry))
        assert caught.value.path.is_relative_to(shared.root)
        assert local.lookup(entry.key) is None
        assert leftovers(local) == []

    def test_a_missing_artifact_is_damage_of_the_tier_that_lacks_it(
        self, local: Vault, shared: Vault, entry: Entry
    ) -> None:
        path = shared.layout.artifact_file(entry.manifest.artifacts[0].digest)
        path.unlink()
        tiers = open_tiers(local.root, shared.root)
        with pytest.raises(CorruptEntryError, match="missing") as caught:
            tiers.copy_nearer(found_in(tiers, entry))
        assert caught.value.path == path

    def test_what_others_may_write_is_not_copied(self, local: Vault, shared: Vault, entry: Entry) -> None:
        shared.layout.artifact_file(entry.manifest.artifacts[0].digest).chmod(0o666)
        tiers = open_tiers(local.root, shared.root)
        with pytest.raises(UnsafeVaultError):
            tiers.copy_nearer(found_in(tiers, entry))
        assert local.lookup(entry.key) is None

    def test_a_full_disk_leaves_the_entry_where_it_is(self, local: Vault, shared: Vault, entry: Entry) -> None:
        tiers = open_tiers(local.root, shared.root)
        found = found_in(tiers, entry)
        with strike_at(0, disk_full), pytest.raises(VaultFullError):
            tiers.copy_nearer(found)
        assert local.lookup(entry.key) is None
        assert set(read_artifacts(tiers, found)) == {ref.digest.hex for ref in entry.manifest.artifacts}

    def test_a_disk_that_is_really_full(self, shared: Vault, tmp_path: Path) -> None:
        large = make_entry(tmp_path / "source", "large", {"x": b"x" * 300_000})
        shared.publish(large.manifest, large.files)

        def run() -> None:
            own = Vault.open(tmp_path / "disk" / "own")
            tiers = open_tiers(own.root, shared.root)
            found = found_in(tiers, large)
            with pytest.raises(VaultFullError):
                tiers.copy_nearer(found)
            read_artifacts(tiers, found)
            assert own.lookup(large.key) is None
            assert leftovers(own) == []

        with_own_tmpfs(tmp_path / "disk", "128k", run)

    def test_an_entry_larger_than_max_size_is_not_copied(self, local: Vault, shared: Vault, entry: Entry) -> None:
        tiers = open_tiers(local.root, shared.root, max_size=100)
        with pytest.raises(VaultFullError, match="max_size"):
            tiers.copy_nearer(found_in(tiers, entry))
        assert local.lookup(entry.key) is None

    def test_while_another_process_copies_it_the_entry_is_used_where_it_is(
        self, local: Vault, shared: Vault, entry: Entry
    ) -> None:
        tiers = open_tiers(local.root, shared.root)
        found = found_in(tiers, entry)
        with local.lock(entry.key, timeout_s=0):
            assert tiers.copy_nearer(found) is found
        assert local.lookup(entry.key) is None


class TestBrokenTiers:
    def test_the_next_tier_is_asked_and_each_broken_one_is_told_of(
        self, local: Vault, shared: Vault, entry: Entry, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "letters").mkdir()
        (tmp_path / "letters" / "letter.txt").write_text("")
        (tmp_path / "unmounted").mkdir()
        (Vault.open(tmp_path / "newer").root / "vault.json").write_text('{"pipevault_vault": 99}')
        names = ("file", "letters", "unmounted", "absent", "newer")
        tiers = open_tiers(local.root, *(tmp_path / name for name in names), shared.root)
        candidates = list(tiers.candidates(entry.key))
        refused = {item.tier.dir.name: item.error for item in candidates if isinstance(item, Refused)}
        assert {name: type(error) for name, error in refused.items()} == {
            "file": NotAVaultError,
            "letters": NotAVaultError,
            "unmounted": NotAVaultError,
            "absent": NotAVaultError,
            "newer": NewerVaultError,
        }
        assert isinstance(candidates[-1], TierHit)
        found, problems = search(tiers, entry.key)
        assert found is not None
        assert found.tier.dir == shared.root
        assert [problem.partition(":")[0] for problem in problems] == [f"tier {tmp_path / name}" for name in names]

    def test_a_tier_that_may_not_be_read(
        self, local: Vault, shared: Vault, entry: Entry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = marker.read_file  # type: ignore[attr-defined]

        def denied(path: Path, **options: Any) -> bytes:
            if path == shared.layout.vault_file:
                raise PermissionError(13, "Permission denied")
            return real(path, **options)

        monkeypatch.setattr(marker, "read_file", denied)
        tiers = open_tiers(local.root, shared.root)
        assert tiers.lookup(entry.key) is None
        [refused] = tiers.candidates(entry.key)
        assert isinstance(refused, Refused)
        assert isinstance(refused.error, VaultNotWritableError)

    def test_an_error_of_the_file_system_has_the_name_of_the_tier(
        self, local: Vault, shared: Vault, entry: Entry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stale(layout: Any) -> bool:
            raise OSError(116, "Stale file handle")

        monkeypatch.setattr("pipevault.store.vault.is_writable", stale)
        [refused] = [
            item for item in open_tiers(local.root, shared.root).candidates(entry.key) if item.tier.dir == shared.root
        ]
        assert isinstance(refused, Refused)
        assert type(refused.error) is VaultError
        assert str(shared.root) in str(refused.error)
        assert "Stale file handle" in str(refused.error)

    def test_a_tier_that_others_may_write(self, local: Vault, shared: Vault, entry: Entry) -> None:
        shared.root.chmod(0o777)
        [refused] = open_tiers(local.root, shared.root).candidates(entry.key)
        assert isinstance(refused, Refused)
        assert isinstance(refused.error, UnsafeVaultError)

    def test_a_group_that_may_write_is_trusted_where_the_setting_says_so(
        self, local: Vault, shared: Vault, entry: Entry
    ) -> None:
        shared.root.chmod(0o775)
        assert open_tiers(local.root, shared.root).lookup(entry.key) is None
        assert found_in(open_tiers(local.root, shared.root, allow_group_write=True), entry)

    def test_a_tier_that_goes_away_after_it_was_opened_is_told_of(
        self, local: Vault, shared: Vault, entry: Entry
    ) -> None:
        tiers = open_tiers(local.root, shared.root)
        found_in(tiers, entry)
        shutil.rmtree(shared.root)
        found, problems = search(tiers, entry.key)
        assert found is None
        assert f"tier {shared.root}" in problems[0]

    def test_a_tier_that_comes_back_is_used(self, local: Vault, shared: Vault, entry: Entry) -> None:
        away = shared.root.rename(shared.root.with_name("away"))
        tiers = open_tiers(local.root, shared.root)
        assert tiers.lookup(entry.key) is None
        away.rename(shared.root)
        found, problems = search(tiers, entry.key)
        assert found is not None
        assert (found.tier.dir, problems) == (shared.root, [])

    def test_a_damaged_manifest_is_refused_and_can_be_set_aside(
        self, local: Vault, shared: Vault, entry: Entry
    ) -> None:
        local.publish(entry.manifest, entry.files)
        path = shared.layout.manifest_file(entry.key)
        path.write_bytes(b"{")
        tiers = open_tiers(shared.root, local.root)
        refused, found = tiers.candidates(entry.key)
        assert isinstance(refused, Refused)
        assert isinstance(refused.error, CorruptEntryError)
        assert refused.vault is not None
        assert isinstance(found, TierHit)
        assert tiers.quarantine(refused.vault, refused.tier, path, "damaged") is not None
        assert not path.exists()

    def test_a_vault_of_its_own_that_is_broken_is_refused_like_a_tier(
        self, shared: Vault, entry: Entry, tmp_path: Path
    ) -> None:
        (tmp_path / "own").write_text("")
        tiers = open_tiers(tmp_path / "own", shared.root)
        found = found_in(tiers, entry)
        assert found.tier.dir == shared.root
        assert tiers.copy_nearer(found) is found
        assert tiers.own() is None


class TestSlowTiers:
    def test_a_tier_that_does_not_answer_is_left_out_and_the_next_one_is_asked(
        self, local: Vault, shared: Vault, silent_vault: Path, entry: Entry
    ) -> None:
        tiers = open_tiers(local.root, silent_vault, shared.root, tier_timeout_s=SHORT_S)
        found, problems = search(tiers, entry.key)
        assert found is not None
        assert found.tier.dir == shared.root
        assert "did not answer within 0.2 s" in problems[0]
        assert left_out_s(silent_vault) > 0
        threads = threading.active_count()
        again = open_tiers(local.root, silent_vault, tier_timeout_s=3600)
        found, problems = search(again, entry.key)
        assert found is None
        assert "is left out for" in problems[0]
        assert threading.active_count() == threads, "a tier that is left out was asked again"

    def test_a_mount_that_hangs_after_it_was_found_good(
        self, local: Vault, shared: Vault, entry: Entry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiers = open_tiers(local.root, shared.root, tier_timeout_s=SHORT_S)
        found = found_in(tiers, entry)
        let_go = threading.Event()
        monkeypatch.setattr(Vault, "owned_path", lambda vault, ref: let_go.wait())
        for question in (tiers.copy_nearer, tiers.open_artifacts):
            with pytest.raises(SlowTierError):
                question(found)
        let_go.set()

    def test_it_is_asked_again_after_a_while_unless_it_still_hangs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now_s = deadline.time.monotonic()  # type: ignore[attr-defined]
        let_go = threading.Event()
        with pytest.raises(SlowTierError, match=f"leaves it out for {RETRY_AFTER_S:.0f} s"):
            ask(tmp_path, let_go.wait, timeout_s=0)
        monkeypatch.setattr(deadline.time, "monotonic", lambda: now_s + RETRY_AFTER_S + 60)  # type: ignore[attr-defined]
        assert left_out_s(tmp_path) == RETRY_AFTER_S
        let_go.set()
        for thread in threading.enumerate():
            if str(tmp_path) in thread.name:
                thread.join()
        assert left_out_s(tmp_path) == 0
        assert ask(tmp_path, lambda: "answer", timeout_s=60) == "answer"

    def test_more_time_for_more_bytes(self, tmp_path: Path) -> None:
        with pytest.raises(SlowTierError, match="within 0 s"):
            ask(tmp_path / "a", threading.Event().wait, timeout_s=0)
        assert ask(tmp_path / "b", lambda: "answer", timeout_s=0, size_bytes=60 * deadline.MIN_BYTES_PER_S) == "answer"

    def test_what_the_question_raises_is_raised(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError):
            ask(tmp_path, lambda: 1 // 0, timeout_s=60)

    @pytest.mark.parametrize(
        "question",
        [
            lambda tiers, found: tiers.open_artifacts(found),
            lambda tiers, found: tiers.is_writable(found.tier),
            lambda tiers, found: tiers.copy_nearer(found),
            lambda tiers, found: tiers.hold(found),
            lambda tiers, found: tiers.limit_size(found),
            lambda tiers, found: tiers.quarantine(found.vault, found.tier, found.path, ""),
        ],
    )
    def test_no_question_is_put_to_a_tier_that_is_left_out(
        self, local: Vault, shared: Vault, entry: Entry, question: Callable[[Tiers, TierHit], object]
    ) -> None:
        tiers = open_tiers(local.root, shared.root)
        found = found_in(tiers, entry)
        let_go = threading.Event()
        with pytest.raises(SlowTierError):
            ask(shared.root, let_go.wait, timeout_s=0)
        with pytest.raises(SlowTierError, match="is left out for"):
            question(tiers, found)
        let_go.set()

    def test_the_newest_are_read_for_half_of_the_time(
        self, local: Vault, shared: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = make_entry(tmp_path / "source", "other", {"x": b"x"})
        shared.publish(other.manifest, other.files)
        for read_s, count in ((29, 2), (31, 1)):
            times = iter([0, read_s, read_s])
            clock = SimpleNamespace(monotonic=lambda times=times: next(times))
            monkeypatch.setattr("pipevault.store.tiers.time", clock)
            assert len(list(open_tiers(local.root, shared.root, tier_timeout_s=60).newest(5))) == count


class TestSignatures:
    @pytest.fixture
    def public_key(self, tmp_path: Path) -> str:
        (tmp_path / "keys").mkdir(mode=0o700)
        return write_key_pair(tmp_path / "keys" / "key").text

    def sign(self, vault: Vault, entry: Entry, tmp_path: Path) -> None:
        vault.sign(entry.manifest, read_private_key(tmp_path / "keys" / "key"))

    def test_an_unsigned_entry_is_passed_over_where_a_signature_is_required(
        self, local: Vault, shared: Vault, entry: Entry, public_key: str, tmp_path: Path
    ) -> None:
        local.publish(entry.manifest, entry.files)
        self.sign(shared, entry, tmp_path)
        tiers = open_tiers(local.root, shared.root, signature="require", trusted_keys=(public_key,))
        refused, found = tiers.candidates(entry.key)
        assert isinstance(refused, Refused)
        assert isinstance(refused.error, SignatureError)
        assert isinstance(found, TierHit)
        assert found.tier.dir == shared.root

    def test_a_tier_has_its_own_policy(self, local: Vault, shared: Vault, entry: Entry, public_key: str) -> None:
        settings = {"signature": "require", "trusted_keys": (public_key,)}
        lenient = open_tiers(local.root, Tier(shared.root, signature="off"), **settings)
        assert found_in(lenient, entry).tier.dir == shared.root
        strict = open_tiers(local.root, Tier(shared.root, signature="require"), trusted_keys=(public_key,))
        assert strict.lookup(entry.key) is None

    def test_warn_finds_it_and_says_so(self, local: Vault, shared: Vault, entry: Entry, public_key: str) -> None:
        tiers = open_tiers(local.root, shared.root, signature="warn", trusted_keys=(public_key,))
        found, problems = search(tiers, entry.key)
        assert found is not None
        assert problems == [found.warning]
        assert "no signature" in found.warning

    def test_signatures_are_copied_with_the_entry(
        self, local: Vault, shared: Vault, entry: Entry, public_key: str, tmp_path: Path
    ) -> None:
        self.sign(shared, entry, tmp_path)
        tiers = open_tiers(local.root, shared.root, signature="require", trusted_keys=(public_key,))
        assert tiers.copy_nearer(found_in(tiers, entry)).tier.dir == local.root
        assert found_in(tiers, entry).tier.dir == local.root

    def test_what_the_nearer_tier_would_refuse_is_not_copied_there(
        self, local: Vault, shared: Vault, entry: Entry, public_key: str
    ) -> None:
        tier = Tier(shared.root, signature="off")
        tiers = open_tiers(local.root, tier, signature="require", trusted_keys=(public_key,))
        with pytest.raises(VaultError, match="takes signed entries only"):
            tiers.copy_nearer(found_in(tiers, entry))
        assert local.lookup(entry.key) is None

    def test_a_signed_entry_is_not_taken_for_an_unsigned_one_that_stands_there(
        self, local: Vault, shared: Vault, entry: Entry, public_key: str, tmp_path: Path
    ) -> None:
        other = replace(entry.manifest, created_at="2025-02-01T12:00:00+00:00")
        local.publish(other, entry.files)
        self.sign(shared, entry, tmp_path)
        tiers = open_tiers(local.root, shared.root, signature="require", trusted_keys=(public_key,))
        with pytest.raises(SignatureError):
            tiers.copy_nearer(found_in(tiers, entry))
        assert local.lookup(entry.key) == other

    def test_what_is_known_is_judged_again(self, shared: Vault, entry: Entry, public_key: str, tmp_path: Path) -> None:
        """It may have been found where no signature was asked for, or other keys were trusted."""
        tiers = {policy: open_tiers(shared.root, signature=policy, trusted_keys=(public_key,)) for policy in POLICIES}
        known = found_in(tiers["off"], entry)
        for before in (known, replace(known, signed=True)):
            [refused] = tiers["require"].candidates(entry.key, before)
            assert isinstance(refused, Refused)
        self.sign(shared, entry, tmp_path)
        [found] = tiers["require"].candidates(entry.key, known)
        assert isinstance(found, TierHit)
        assert found.signed
        assert found.manifest is known.manifest
        [refused] = open_tiers(shared.root, signature="require").candidates(entry.key, found)
        assert isinstance(refused, Refused)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_a_signature_stands_for_an_owner(
        self, local: Vault, shared: Vault, entry: Entry, public_key: str, tmp_path: Path, policy: str
    ) -> None:
        self.sign(shared, entry, tmp_path)
        for path in shared.root.rglob("*"):
            path.chmod(path.stat().st_mode | 0o002)
        tiers = open_tiers(local.root, shared.root, signature=policy, trusted_keys=(public_key,))
        found = found_in(tiers, entry)
        assert found.signed
        assert isinstance(found.unowned, UnsafeVaultError)
        assert set(read_artifacts(tiers, found)) == {ref.digest.hex for ref in entry.manifest.artifacts}
        assert tiers.copy_nearer(found).tier.dir == local.root
        [refused] = open_tiers(shared.root).candidates(entry.key)
        assert isinstance(refused, Refused)
        assert isinstance(refused.error, UnsafeVaultError)

    def test_what_is_known_is_refused_once_its_owner_is_not_trusted(self, shared: Vault, entry: Entry) -> None:
        shared.layout.manifest_file(entry.key).chmod(0o664)
        known = found_in(open_tiers(shared.root, allow_group_write=True), entry)
        [refused] = open_tiers(shared.root).candidates(entry.key, known)
        assert isinstance(refused, Refused)

    def test_a_trusted_key_that_is_none_is_an_error(self, local: Vault, entry: Entry) -> None:
        tiers = open_tiers(local.root, signature="require", trusted_keys=("pipevault-ed25519 nonsense",))
        with pytest.raises(KeyFileError):
            tiers.lookup(entry.key)
        assert open_tiers(local.root, trusted_keys=("pipevault-ed25519 nonsense",)).lookup(entry.key) is None


class TestUse:
    def test_what_is_known_is_given_again_until_it_changes(self, shared: Vault, entry: Entry) -> None:
        tiers = open_tiers(shared.root)
        known = found_in(tiers, entry)
        [again] = tiers.candidates(entry.key, known)
        assert isinstance(again, TierHit)
        assert again.manifest is known.manifest
        path = shared.layout.manifest_file(entry.key)
        later = replace(entry.manifest, created_at="2025-02-01T12:00:00+00:00")
        path.unlink()
        path.write_bytes(later.to_bytes())
        [changed] = tiers.candidates(entry.key, known)
        assert isinstance(changed, TierHit)
        assert changed.manifest == later
        path.unlink()
        assert list(tiers.candidates(entry.key, known)) == []

    def test_a_lease_and_the_use_are_where_the_entry_is_loaded_from(self, shared: Vault, entry: Entry) -> None:
        tiers = open_tiers(shared.root.parent / "own", shared.root)
        lease = tiers.hold(found_in(tiers, entry))
        assert [path.name[:64] for path in shared.layout.leases_dir.iterdir()] == [entry.key.hex]
        assert shared.layout.use_file(entry.key).exists()
        lease.release()
        assert list(shared.layout.leases_dir.iterdir()) == []

    def test_an_entry_that_was_removed_meanwhile_is_not_held(self, shared: Vault, entry: Entry) -> None:
        tiers = open_tiers(shared.root)
        found = found_in(tiers, entry)
        shared.remove(shared.plan_removal([entry.key]))
        with pytest.raises(CorruptEntryError, match="removed"):
            tiers.hold(found)
        assert list(shared.layout.leases_dir.iterdir()) == []

    def test_max_size_makes_room_but_keeps_what_is_held(self, shared: Vault, entry: Entry, tmp_path: Path) -> None:
        old = make_entry(tmp_path / "source", "old", {"x": b"x" * 5000})
        shared.publish(old.manifest, old.files)
        os.utime(shared.layout.manifest_file(old.key), times=(1e9, 1e9))
        tiers = open_tiers(shared.root, max_size=entry.manifest.size_bytes + 4000)
        found = found_in(tiers, entry)
        lease = tiers.hold(found)
        tiers.limit_size(found)
        assert shared.lookup(old.key) is None
        assert whole(shared, entry.manifest)
        lease.release()
