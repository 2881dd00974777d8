"""Pruning: what a plan chooses, and what is done of it when the vault changes in between."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.fault_steps import killed_at_each_step
from helpers.store_entries import Entry, make_entry, whole
from pipevault.digest import Digest, digest_bytes
from pipevault.errors import PinError, VaultNotWritableError
from pipevault.store.inventory import find_manifests
from pipevault.store.layout import QUARANTINE_TIME, Layout
from pipevault.store.places import iter_foreign
from pipevault.store.retention.prune import carry_out, enforce_max_size, plan_prune, vault_size_bytes
from pipevault.store.retention.removal import ORPHAN_MIN_AGE_S
from pipevault.store.retention.usage import last_use_s
from pipevault.store.vault import Vault

DAY = 86_400.0
NOW = 1_600_000_000.0
SHARED = b"shared" * 1000


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


Publish = Callable[..., Entry]


@pytest.fixture
def publish(vault: Vault, tmp_path: Path) -> Publish:
    """Publishes an entry whose last use (or, without one, publication) was ``days`` before ``NOW``."""

    def publish(name: str, *artifacts: bytes, days: float, used: bool = True) -> Entry:
        files = {f"unet/{index}.pt2": data for index, data in enumerate(artifacts)}
        entry = make_entry(tmp_path / "source", name, files)
        vault.publish(entry.manifest, entry.files)
        time_s = NOW - days * DAY
        published_s = NOW - 1000 * DAY if used else time_s
        os.utime(vault.layout.manifest_file(entry.key), times=(published_s, published_s))
        if used:
            vault.record_use(entry.key)
            os.utime(vault.layout.use_file(entry.key), times=(time_s, time_s))
        return entry

    return publish


@pytest.fixture
def three(publish: Publish) -> list[Entry]:
    """Three entries, least recently used first; the first two share an artifact."""
    return [
        publish("old", SHARED, b"old" * 500, days=30),
        publish("middle", SHARED, b"middle" * 500, days=20),
        publish("new", b"new" * 500, days=10),
    ]


def manifest_bytes(vault: Vault, entry: Entry) -> int:
    return vault.layout.manifest_file(entry.key).stat().st_size


def standing(vault: Vault, entries: list[Entry]) -> list[bool]:
    return [whole(vault, entry.manifest) for entry in entries]


def keys(going: object) -> list[Digest]:
    return [item.key for item in going]  # type: ignore[attr-defined]


class TestPlan:
    def test_nothing_asked_changes_nothing(self, vault: Vault, three: list[Entry]) -> None:
        plan = plan_prune(vault, now_s=NOW)
        assert (plan.entries, plan.artifacts, plan.freed_bytes) == ((), (), 0)
        assert plan.size_bytes == plan.left_bytes == vault_size_bytes(vault.layout)

    def test_least_recently_used_first_down_to_the_size(self, vault: Vault, three: list[Entry]) -> None:
        size = vault_size_bytes(vault.layout)
        plan = plan_prune(vault, max_size=size - 1, now_s=NOW)
        assert keys(plan.entries) == [three[0].key]
        assert [going.reason for going in plan.entries] == ["least recently used"]
        assert plan.freed_bytes == manifest_bytes(vault, three[0]) + 1500
        assert plan.because == ()
        assert standing(vault, three) == [True] * 3

    def test_a_shared_artifact_counts_once_and_goes_with_the_last_that_names_it(
        self, vault: Vault, three: list[Entry]
    ) -> None:
        two_less = vault_size_bytes(vault.layout) - manifest_bytes(vault, three[0]) - 1501
        plan = plan_prune(vault, max_size=two_less, now_s=NOW)
        assert keys(plan.entries) == [three[0].key, three[1].key]
        assert set(plan.artifacts) == {digest_bytes(data) for data in (SHARED, b"old" * 500, b"middle" * 500)}
        manifests = manifest_bytes(vault, three[0]) + manifest_bytes(vault, three[1])
        assert plan.freed_bytes == manifests + len(SHARED) + 1500 + 3000

    def test_exactly_the_size_is_enough(self, vault: Vault, three: list[Entry]) -> None:
        assert plan_prune(vault, max_size=vault_size_bytes(vault.layout), now_s=NOW).entries == ()

    def test_older_than(self, vault: Vault, three: list[Entry]) -> None:
        plan = plan_prune(vault, older_than_s=20 * DAY, now_s=NOW)
        assert keys(plan.entries) == [three[0].key, three[1].key]
        assert plan.entries[0].reason == "not used for 30.0 days"

    def test_unused(self, vault: Vault, three: list[Entry], publish: Publish) -> None:
        never = publish("never", b"never", days=1, used=False)
        publish("just now", b"just now", days=0, used=False)
        assert keys(plan_prune(vault, unused=True, now_s=NOW).entries) == [never.key]

    def test_a_use_noted_beside_a_read_only_vault_counts(self, vault: Vault, publish: Publish) -> None:
        never = publish("never", b"never", days=1, used=False)
        replace(vault, writable=False).record_use(never.key)
        assert plan_prune(vault, unused=True, now_s=NOW).entries == ()

    @pytest.mark.parametrize("bad", [{"max_size": -1}, {"older_than_s": -1.0}, {"older_than_s": float("nan")}])
    def test_values_that_make_no_sense(self, vault: Vault, bad: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="expected 0 or more"):
            plan_prune(vault, **bad)  # type: ignore[arg-type]

    def test_an_empty_vault(self, vault: Vault) -> None:
        plan = plan_prune(vault, max_size=0, older_than_s=0, unused=True)
        assert (plan.entries, plan.size_bytes, plan.because) == ((), 0, ())


class TestStaying:
    def test_pinned_and_leased_entries_stay_and_are_named(self, vault: Vault, three: list[Entry]) -> None:
        vault.pin(three[0].key, "prod")
        lease = vault.lease(three[1].key)
        plan = plan_prune(vault, max_size=0, older_than_s=5 * DAY, now_s=time.time())
        assert keys(plan.entries) == [three[2].key]
        reasons = {entry.key: entry.reason for entry in plan.staying}
        assert reasons[three[0].key] == "pinned as prod"
        assert reasons[three[1].key].startswith(f"in use by process {os.getpid()} on ")
        assert any("pinned as prod" in clause for clause in plan.because)
        assert any("in use by" in clause for clause in plan.because)
        report = carry_out(vault, plan)
        assert standing(vault, three[:2]) == [True, True]
        assert report.left_bytes == vault_size_bytes(vault.layout)
        lease.release()

    def test_one_more_that_is_not_named(
        self, vault: Vault, three: list[Entry], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number, entry in enumerate(three):
            vault.pin(entry.key, f"pin-{number}")
        monkeypatch.setattr("pipevault.store.retention.prune._NAMED_REASONS", len(three) - 1)
        assert plan_prune(vault, max_size=0, now_s=NOW).because[-1] == "1 more entry stays"

    def test_what_pinned_and_removed_entries_share_stays(self, vault: Vault, three: list[Entry]) -> None:
        vault.pin(three[1].key, "prod")
        carry_out(vault, plan_prune(vault, max_size=0, now_s=NOW))
        assert standing(vault, [three[1]]) == [True]
        assert vault.lookup(three[0].key) is None

    def test_a_damaged_manifest_stays_and_keeps_what_it_may_name(self, vault: Vault, three: list[Entry]) -> None:
        path = vault.layout.manifest_file(three[1].key)
        path.write_bytes(path.read_bytes().replace(b'"manifest_version":2', b'"manifest_version":3'))
        plan = plan_prune(vault, max_size=0, now_s=NOW)
        carry_out(vault, plan)
        assert path.exists()
        assert vault.layout.artifact_file(digest_bytes(SHARED)).exists()
        assert any("later pipevault" in clause for clause in plan.because)

    def test_an_unreadable_pin_stops_everything(self, vault: Vault, three: list[Entry]) -> None:
        vault.pin(three[2].key, "prod")
        vault.layout.pin_file("prod").write_bytes(b"damaged")
        with pytest.raises(PinError):
            plan_prune(vault, max_size=0, now_s=NOW)

    def test_a_pin_of_an_entry_that_is_gone_keeps_nothing(self, vault: Vault, three: list[Entry]) -> None:
        vault.pin(three[0].key, "prod")
        vault.layout.manifest_file(three[0].key).unlink()
        plan = plan_prune(vault, max_size=0, now_s=NOW)
        assert plan.staying == ()
        assert keys(plan.entries) == [three[1].key, three[2].key]


class TestClocks:
    def test_an_entry_from_the_future_goes_last_and_ages_from_then_on(self, vault: Vault, three: list[Entry]) -> None:
        ahead = three[0].key
        os.utime(vault.layout.use_file(ahead), times=(NOW + 900 * DAY,) * 2)
        plan = plan_prune(vault, max_size=vault_size_bytes(vault.layout) - 1, now_s=NOW)
        assert keys(plan.entries) == [three[1].key]
        assert plan.ahead == (ahead,)
        carry_out(vault, plan)
        assert last_use_s(vault.layout, ahead) == NOW
        later = plan_prune(vault, older_than_s=30 * DAY, now_s=NOW + 31 * DAY)
        assert ahead in keys(later.entries)

    def test_it_is_not_immortal(self, vault: Vault, three: list[Entry]) -> None:
        os.utime(vault.layout.use_file(three[0].key), times=(NOW + 900 * DAY,) * 2)
        carry_out(vault, plan_prune(vault, max_size=0, now_s=NOW))
        assert vault.lookup(three[0].key) is None

    def test_a_clock_that_went_back_removes_nothing_by_age(self, vault: Vault, three: list[Entry]) -> None:
        plan = plan_prune(vault, older_than_s=0, unused=True, now_s=NOW - 2000 * DAY)
        assert plan.entries == ()
        assert "clock of this machine is behind" in plan.problems[0]
        assert plan.ahead == ()

    def test_and_keeps_the_order_for_a_size(self, vault: Vault, three: list[Entry]) -> None:
        plan = plan_prune(vault, max_size=0, now_s=NOW - 2000 * DAY)
        assert keys(plan.entries) == [entry.key for entry in three]


class TestCarryOut:
    def test_what_happened_in_bytes(self, vault: Vault, three: list[Entry]) -> None:
        before = vault_size_bytes(vault.layout)
        plan = plan_prune(vault, older_than_s=15 * DAY, now_s=NOW)
        report = carry_out(vault, plan)
        assert keys(report.entries) == [three[0].key, three[1].key]
        assert report.freed_bytes == plan.freed_bytes == before - vault_size_bytes(vault.layout)
        assert report.left_bytes == vault_size_bytes(vault.layout)
        assert standing(vault, three[2:]) == [True]
        assert not vault.layout.use_file(three[0].key).exists()

    def test_a_second_time_frees_nothing(self, vault: Vault, three: list[Entry]) -> None:
        plan = plan_prune(vault, older_than_s=15 * DAY, now_s=NOW)
        carry_out(vault, plan)
        report = carry_out(vault, plan)
        assert (report.entries, report.artifacts, report.freed_bytes) == ((), (), 0)

    def test_a_read_only_vault(self, vault: Vault, three: list[Entry]) -> None:
        plan = plan_prune(vault, max_size=0, now_s=NOW)
        with pytest.raises(VaultNotWritableError):
            carry_out(replace(vault, writable=False), plan)
        assert standing(vault, three) == [True] * 3

    @pytest.mark.parametrize("event", ["used", "pinned", "leased", "frozen again"])
    def test_what_is_needed_again_since_the_plan_stays(self, vault: Vault, three: list[Entry], event: str) -> None:
        plan = plan_prune(vault, max_size=0, now_s=NOW)
        entry = three[0]
        lease = None
        if event == "used":
            vault.record_use(entry.key)
        elif event == "pinned":
            vault.pin(entry.key, "prod")
        elif event == "leased":
            lease = vault.lease(entry.key)
        else:
            vault.layout.manifest_file(entry.key).unlink()
            vault.publish(entry.manifest, entry.files)
        report = carry_out(vault, plan)
        [staying] = report.staying
        assert staying.key == entry.key
        assert {"leased": "in use"}.get(event, event) in staying.reason
        assert standing(vault, [entry]) == [True]
        assert keys(report.entries) == [three[1].key, three[2].key]
        assert report.left_bytes == vault_size_bytes(vault.layout)
        if lease:
            lease.release()

    def test_a_lease_that_appears_while_entries_go_is_noticed(
        self, vault: Vault, three: list[Entry], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from pipevault.store.retention import prune

        plan = plan_prune(vault, max_size=0, now_s=NOW)
        remove: Callable[..., Any] = prune.take_aside  # type: ignore[attr-defined]
        held = []

        def remove_and_lease(*arguments: object) -> Any:
            held.append(vault.lease(three[1].key))
            return remove(*arguments)

        monkeypatch.setattr(prune, "take_aside", remove_and_lease)
        report = carry_out(vault, plan)
        assert keys(report.staying) == [three[1].key]
        assert standing(vault, [three[1]]) == [True]
        for lease in held:
            lease.release()

    def test_an_artifact_that_was_named_since_the_plan_stays(
        self, vault: Vault, three: list[Entry], tmp_path: Path
    ) -> None:
        plan = plan_prune(vault, max_size=0, now_s=NOW)
        late = make_entry(tmp_path / "source", "late", {"unet/0.pt2": SHARED})
        vault.publish(late.manifest, late.files)
        report = carry_out(vault, plan)
        assert digest_bytes(SHARED) not in report.artifacts
        assert standing(vault, [late]) == [True]

    def test_an_artifact_that_a_publisher_has_touched_meanwhile_stays(
        self, vault: Vault, three: list[Entry], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from pipevault.store.retention import removal

        plan = plan_prune(vault, max_size=0, now_s=NOW)
        find = removal.mentioned  # type: ignore[attr-defined]

        def touch_and_find(layout: Layout, digests: Any) -> object:
            os.utime(vault.layout.artifact_file(digest_bytes(SHARED)))
            return find(layout, digests)

        os.utime(vault.layout.artifact_file(digest_bytes(SHARED)), times=(NOW, NOW))
        monkeypatch.setattr(removal, "mentioned", touch_and_find)
        report = carry_out(vault, plan)
        assert digest_bytes(SHARED) not in report.artifacts
        assert len(report.artifacts) == 3
        assert vault.layout.artifact_file(digest_bytes(SHARED)).exists()


def test_a_pin_that_cannot_be_read_by_now_gives_the_entry_back(
    vault: Vault, three: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipevault.store.retention import prune

    plan, take_aside = plan_prune(vault, max_size=0, now_s=NOW), prune.take_aside  # type: ignore[attr-defined]
    there = len(list(vault.manifests()))

    def damaging(layout: Layout, key: Digest) -> Any:
        path = take_aside(layout, key)
        layout.pins_dir.mkdir(exist_ok=True)
        layout.pin_file("bad").write_text("no pin")
        return path

    monkeypatch.setattr(prune, "take_aside", damaging)
    with pytest.raises(PinError):
        carry_out(vault, plan)
    assert len(list(vault.manifests())) == there


class TestLeftBehind:
    def test_old_orphans_go_and_young_ones_stay_and_are_told(self, vault: Vault, three: list[Entry]) -> None:
        for data, age_s in ((b"old orphan", ORPHAN_MIN_AGE_S + 60), (b"young orphan", 0)):
            path = vault.layout.artifact_file(digest_bytes(data))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            os.utime(path, times=(NOW - age_s,) * 2)
        plan = plan_prune(vault, now_s=NOW)
        assert plan.orphans == (digest_bytes(b"old orphan"),)
        assert plan.freed_bytes == len(b"old orphan")
        assert carry_out(vault, plan).artifacts == plan.orphans
        assert (
            "1 artifact that no entry names is younger than an hour" in plan_prune(vault, max_size=0, now_s=NOW).because
        )

    def test_quarantine_goes_before_any_entry_and_only_for_a_size(self, vault: Vault, three: list[Entry]) -> None:
        bad = vault.layout.root / "bad"
        bad.write_bytes(b"b" * 9000)
        assert vault.quarantine(bad, "damaged") is not None
        assert plan_prune(vault, older_than_s=9999 * DAY, now_s=NOW).quarantined == ()
        plan = plan_prune(vault, max_size=vault_size_bytes(vault.layout) - 9000, now_s=NOW)
        assert plan.entries == ()
        report = carry_out(vault, plan)
        assert report.freed_bytes >= 9000
        assert report.left_bytes == vault_size_bytes(vault.layout)
        assert standing(vault, three) == [True] * 3

    @pytest.mark.parametrize("enforce", [True, False])
    def test_quarantine_is_bounded_by_age_and_by_size(
        self, vault: Vault, three: list[Entry], monkeypatch: pytest.MonkeyPatch, enforce: bool
    ) -> None:
        monkeypatch.setattr("pipevault.store.retention.prune.QUARANTINE_MAX_BYTES", 250)
        now_s = time.time()
        folder = vault.layout.quarantine_dir
        folder.mkdir(exist_ok=True)
        files = []
        for number, days in enumerate((31, 3, 2, 1)):
            told = time.strftime(QUARANTINE_TIME, time.gmtime(now_s - days * DAY))
            files.append(vault.layout.quarantine_file(time=told, random_hex=f"{number:08x}", name="x"))
            files[-1].write_bytes(b"q" * 100)
            os.utime(files[-1], times=(1, 1))  # moving a file to quarantine keeps its old time
        if enforce:
            enforce_max_size(vault, three[0].key, max_size=10**9)
        else:
            plan = plan_prune(vault, now_s=now_s)
            assert plan.quarantined == tuple(files[:2])
            assert plan.freed_bytes == 200
            assert carry_out(vault, plan).left_bytes == vault_size_bytes(vault.layout)
        assert sorted(folder.iterdir()) == sorted(files[2:])
        assert standing(vault, three) == [True] * 3

    def test_signatures_count_and_go_with_their_entry(self, vault: Vault, three: list[Entry]) -> None:
        path = vault.layout.signature_file(three[0].key, "0123456789abcdef")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"s" * 700)
        plan = plan_prune(vault, older_than_s=25 * DAY, now_s=NOW)
        assert plan.freed_bytes == manifest_bytes(vault, three[0]) + 1500 + 700
        assert carry_out(vault, plan).freed_bytes == plan.freed_bytes
        assert not path.exists()

    def test_what_belonged_to_no_entry_goes(self, vault: Vault, three: list[Entry]) -> None:
        vault.layout.manifest_file(three[0].key).unlink()
        plan = plan_prune(vault, now_s=NOW)
        assert plan.strays == (three[0].key,)
        carry_out(vault, plan)
        assert not vault.layout.use_file(three[0].key).exists()

    def test_leftovers_of_dead_processes_go(self, vault: Vault, three: list[Entry], tmp_path: Path) -> None:
        folder = vault.layout.staging_dir(host="gone", pid=4711, random_hex="0" * 16)
        folder.mkdir(parents=True)
        (folder / "half.pt2").write_bytes(b"half")
        for path in (folder, folder / "half.pt2"):
            os.utime(path, times=(0, 0))
        plan = plan_prune(vault, now_s=NOW)
        assert folder in [item.path for item in plan.leftovers]
        assert folder in [item.path for item in carry_out(vault, plan).leftovers]
        assert not folder.exists()


class TestEnforce:
    def test_no_limit_and_far_below_it_no_manifest_is_read(
        self, vault: Vault, three: list[Entry], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipevault.store.retention.prune.plan_prune", None)
        assert enforce_max_size(vault, three[0].key, max_size=10**9) is None

    def test_the_entry_just_published_stays_though_it_is_the_oldest(self, vault: Vault, three: list[Entry]) -> None:
        report = enforce_max_size(vault, three[0].key, max_size=vault_size_bytes(vault.layout) - 1)
        assert report is not None
        assert keys(report.entries) == [three[1].key]
        assert standing(vault, [three[0], three[2]]) == [True, True]

    def test_a_limit_that_cannot_be_reached_is_told(self, vault: Vault, three: list[Entry]) -> None:
        report = enforce_max_size(vault, three[0].key, max_size=10)
        assert report is not None
        assert standing(vault, three[:1]) == [True]
        assert "more than its max_size of 10" in report.problems[-1]
        assert "just published" in report.problems[-1]

    def test_a_damaged_pin_is_told_and_not_raised(self, vault: Vault, three: list[Entry]) -> None:
        vault.pin(three[0].key, "prod")
        vault.layout.pin_file("prod").write_bytes(b"")
        report = enforce_max_size(vault, three[2].key, max_size=10)
        assert report is not None
        assert "unpin prod" in report.problems[0]
        assert standing(vault, three) == [True] * 3

    def test_a_read_only_vault_is_left_alone(self, vault: Vault, three: list[Entry]) -> None:
        assert enforce_max_size(replace(vault, writable=False), three[0].key, max_size=1) is None


def test_killed_while_pruning(vault: Vault, three: list[Entry], tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(vault.root, target)
    outcomes = set()
    for _ in killed_at_each_step(
        lambda: carry_out(Vault.open(target), plan_prune(Vault.open(target), older_than_s=15 * DAY, now_s=NOW + DAY))
    ):
        survivor = Vault.open(target)
        assert whole(survivor, three[2].manifest)
        for entry in three[:2]:
            there = survivor.lookup(entry.key) is not None
            assert not there or whole(survivor, entry.manifest)
            outcomes.add(there)
        assert list(iter_foreign(survivor.layout)) == []
        carry_out(survivor, plan_prune(survivor, older_than_s=15 * DAY, now_s=NOW + DAY))
        orphans = plan_prune(survivor, now_s=time.time() + 2 * ORPHAN_MIN_AGE_S)
        carry_out(survivor, orphans)
        assert list(find_manifests(survivor.layout)) == [three[2].key]
        assert vault_size_bytes(survivor.layout) == manifest_bytes(survivor, three[2]) + 1500
        shutil.rmtree(target)
        shutil.copytree(vault.root, target)
    assert outcomes == {True, False}
