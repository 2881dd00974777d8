"""What plans need: pruning, removal, bundles and the watch over pins follow it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.bundles import bundle_bytes, files_of
from helpers.store_entries import Entry, make_entry, make_graph, make_graph_key, make_plan, whole
from pipevault.digest import Digest, digest_bytes
from pipevault.errors import BundleError, EntryInUseError, UnknownKeyError
from pipevault.store.bundle import export_bundle, import_bundle
from pipevault.store.check import verify
from pipevault.store.needs import needed_by, needed_first
from pipevault.store.places import iter_keys
from pipevault.store.retention import prune
from pipevault.store.retention.pins import pins
from pipevault.store.retention.prune import carry_out, enforce_max_size, plan_prune
from pipevault.store.retention.removal import refuse_in_use
from pipevault.store.vault import Vault

KEYS = [digest_bytes(bytes([number])) for number in range(6)]
needs_of_each = st.dictionaries(st.sampled_from(KEYS), st.lists(st.sampled_from(KEYS), max_size=3))


@dataclass(frozen=True)
class Shop:
    """Two plans that share a graph; each has one of its own, and one graph is needed by none."""

    first: Entry
    second: Entry
    shared: Entry
    of_first: Entry
    of_second: Entry
    lonely: Entry

    @property
    def all(self) -> tuple[Entry, ...]:
        return (self.shared, self.of_first, self.of_second, self.lonely, self.first, self.second)


@pytest.fixture
def shop(vault: Vault, tmp_path: Path) -> Shop:
    source = tmp_path / "source"
    shared, of_first, of_second, lonely = (make_graph(source, "unet", text) for text in ("1", "2", "3", "4"))
    shop = Shop(
        make_plan(source, "first", shared, of_first),
        make_plan(source, "second", shared, of_second),
        *(shared, of_first, of_second, lonely),
    )
    for entry in shop.all:
        vault.publish(entry.manifest, entry.files)
    return shop


def keys_of(*entries: Entry) -> set[Digest]:
    return {entry.key for entry in entries}


def standing(vault: Vault) -> set[Digest]:
    return set(list(iter_keys(vault.layout)))


class TestClosure:
    @given(needs_of_each, st.lists(st.sampled_from(KEYS), max_size=3))
    def test_all_that_can_be_reached(self, needs: dict[Digest, list[Digest]], keys: list[Digest]) -> None:
        found = needed_by(keys, lambda key: needs.get(key, ()))
        reached, grown = set(keys), True
        while grown:
            more = {key for one in reached for key in needs.get(one, ())} - reached
            reached, grown = reached | more, bool(more)
        assert found.keys() == reached - set(keys)
        assert set(found.values()) <= set(keys)

    @given(needs_of_each)
    def test_each_once_and_what_is_needed_first(self, needs: dict[Digest, list[Digest]]) -> None:
        acyclic = {key: [other for other in others if other < key] for key, others in needs.items()}
        order = list(needed_first(acyclic))
        assert sorted(order) == sorted(acyclic)
        for key, others in acyclic.items():
            assert all(order.index(other) < order.index(key) for other in others if other in acyclic)
        assert sorted(needed_first(needs)) == sorted(needs)  # circles end too

    def test_a_long_chain(self) -> None:
        chain = [digest_bytes(str(number).encode()) for number in range(5000)]
        needs = {key: [following] for key, following in pairwise(chain)} | {chain[-1]: []}
        assert list(needed_first(needs)) == chain[::-1]
        assert len(needed_by(chain[:1], needs.__getitem__)) == 4999


class TestShelf:
    def test_the_graphs_of_a_part_and_no_others(self, vault: Vault, shop: Shop, tmp_path: Path) -> None:
        other = make_graph(tmp_path / "source", "vae", "1")
        vault.publish(other.manifest, other.files)
        graphs = [shop.shared, shop.of_first, shop.of_second, shop.lonely]
        shelf = shop.shared.manifest.key.shelf
        assert vault.shelf(shelf) == sorted(keys_of(*graphs))
        assert vault.shelf(other.manifest.key.shelf) == [other.key]
        assert vault.layout.shelf_dir(shelf) == vault.layout.manifest_file(shop.shared.key).parent

    def test_one_that_is_not_there_is_empty(self, vault: Vault) -> None:
        assert vault.shelf(digest_bytes(b"nothing")) == []

    def test_other_files_are_passed_over(self, vault: Vault, shop: Shop) -> None:
        shelf = shop.shared.manifest.key.shelf
        folder = vault.layout.shelf_dir(shelf)
        for name in ("notes.txt", f"{'0' * 64}.json", f"{shop.shared.key.hex[:63]}.json"):
            (folder / name).write_text("")
        assert len(vault.shelf(shelf)) == 4

    def test_no_file_is_opened(self, vault: Vault, shop: Shop) -> None:
        shelf = shop.shared.manifest.key.shelf
        for path in vault.layout.shelf_dir(shelf).iterdir():
            path.write_bytes(b"damaged")
        assert len(vault.shelf(shelf)) == 4

    def test_an_empty_one_goes_and_comes_again(self, vault: Vault, shop: Shop, tmp_path: Path) -> None:
        other = make_graph(tmp_path / "source", "vae", "1")
        folder = vault.layout.shelf_dir(other.manifest.key.shelf)
        vault.publish(other.manifest, other.files)
        vault.remove(vault.plan_removal([other.key]))
        assert not folder.exists()
        vault.publish(other.manifest, other.files)
        assert whole(vault, other.manifest)
        vault.layout.manifest_file(other.key).unlink()
        carry_out(vault, plan_prune(vault))
        assert not folder.exists()
        assert standing(vault) == keys_of(*shop.all)


class TestPrune:
    """Every rule asks for everything to go."""

    @pytest.fixture(params=["max_size", "older_than_s", "unused"])
    def rule(self, request: pytest.FixtureRequest) -> dict[str, float]:
        return {request.param: True if request.param == "unused" else 0}

    def left(self, vault: Vault, rule: dict[str, float]) -> set[Digest]:
        plan = plan_prune(vault, now_s=time.time() + 7200, **rule)  # type: ignore[arg-type]
        carry_out(vault, plan)
        return standing(vault)

    def test_nothing_is_pinned(self, vault: Vault, shop: Shop, rule: dict[str, float]) -> None:
        assert self.left(vault, rule) == set()

    def test_what_a_pinned_plan_needs_stays_whole(self, vault: Vault, shop: Shop, rule: dict[str, float]) -> None:
        vault.pin(shop.first.key, "prod")
        assert self.left(vault, rule) == keys_of(shop.first, shop.shared, shop.of_first)
        assert all(whole(vault, entry.manifest) for entry in (shop.first, shop.shared, shop.of_first))

    def test_what_a_leased_plan_needs_stays(self, vault: Vault, shop: Shop, rule: dict[str, float]) -> None:
        lease = vault.lease(shop.second.key)
        assert self.left(vault, rule) == keys_of(shop.second, shop.shared, shop.of_second)
        lease.release()
        assert self.left(vault, rule) == set()

    def test_a_pinned_graph_keeps_no_plan(self, vault: Vault, shop: Shop, rule: dict[str, float]) -> None:
        vault.pin(shop.shared.key, "graph")
        assert self.left(vault, rule) == keys_of(shop.shared)

    def test_a_pinned_plan_that_is_damaged_keeps_what_it_may_need(
        self, vault: Vault, shop: Shop, rule: dict[str, float]
    ) -> None:
        path = vault.layout.manifest_file(shop.first.key)
        path.write_bytes(path.read_bytes().replace(b'"manifest_version":2', b'"manifest_version":3'))
        vault.pin(shop.first.key, "prod")
        assert self.left(vault, rule) == keys_of(shop.first, shop.shared, shop.of_first)

    def test_the_reason_names_the_plan_and_its_pin(self, vault: Vault, shop: Shop) -> None:
        vault.pin(shop.first.key, "prod")
        reasons = {entry.key: entry.reason for entry in plan_prune(vault, max_size=0).staying}
        assert reasons[shop.shared.key] == f"needed by {shop.first.key.short}, which is pinned as prod"

    def test_by_way_of_another(self, vault: Vault, shop: Shop, tmp_path: Path) -> None:
        above = make_plan(tmp_path / "source", "above", shop.second)
        vault.publish(above.manifest, above.files)
        vault.pin(above.key, "prod")
        assert self.left(vault, {"max_size": 0}) == keys_of(above, shop.second, shop.shared, shop.of_second)

    def test_what_was_just_published_keeps_its_graphs(self, vault: Vault, shop: Shop) -> None:
        enforce_max_size(vault, shop.first.key, max_size=0)
        assert standing(vault) == keys_of(shop.first, shop.shared, shop.of_first)

    def test_a_plan_without_its_graphs_is_no_fault(self, vault: Vault, shop: Shop) -> None:
        vault.remove(vault.plan_removal([shop.shared.key]))
        vault.pin(shop.first.key, "prod")
        assert verify(vault).findings == ()
        assert self.left(vault, {"max_size": 0}) == keys_of(shop.first, shop.of_first)

    def test_a_pin_that_appears_meanwhile(self, vault: Vault, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = plan_prune(vault, max_size=0)
        take_aside: Callable[..., Any] = prune.take_aside  # type: ignore[attr-defined]
        done: list[Digest] = []

        def pinning(layout: object, key: Digest) -> Any:
            if not done:
                vault.pin(next(entry.key for entry in (shop.first, shop.second) if entry.key != key), "late")
            done.append(key)
            return take_aside(layout, key)

        monkeypatch.setattr(prune, "take_aside", pinning)
        report = carry_out(vault, plan)
        [pinned] = [entry for entry in (shop.first, shop.second) if entry.key == pins(vault.layout)["late"]]
        needed = set(pinned.manifest.needs)
        assert pinned.key in standing(vault)
        assert needed <= standing(vault)
        assert {entry.key for entry in report.staying} == {pinned.key, *needed}


class TestRemoval:
    def test_a_plan_alone(self, vault: Vault, shop: Shop) -> None:
        assert vault.remove(vault.plan_removal([shop.first.key])).artifacts == ()
        assert standing(vault) == keys_of(*shop.all) - {shop.first.key}

    def test_with_the_graphs_that_no_other_plan_needs(self, vault: Vault, shop: Shop) -> None:
        plan = vault.plan_removal([shop.first.key], with_needed=True)
        assert set(plan.keys) == keys_of(shop.first, shop.of_first)
        vault.remove(plan)
        assert standing(vault) == keys_of(shop.second, shop.shared, shop.of_second, shop.lonely)

    def test_both_plans_take_all(self, vault: Vault, shop: Shop) -> None:
        plan = vault.plan_removal([shop.first.key, shop.second.key], with_needed=True)
        assert set(plan.keys) == keys_of(*shop.all) - {shop.lonely.key}

    def test_what_a_graph_that_stays_needs_stays(self, vault: Vault, shop: Shop, tmp_path: Path) -> None:
        below = make_graph(tmp_path / "source", "unet", "below")
        middle = make_entry(tmp_path / "source", "", {}, key=make_graph_key("unet", "middle"), needs=[below.key])
        plans = [make_plan(tmp_path / "source", name, middle) for name in ("third", "fourth")]
        for entry in (below, middle, *plans):
            vault.publish(entry.manifest, entry.files)
        assert vault.plan_removal([plans[0].key], with_needed=True).keys == (plans[0].key,)
        both = vault.plan_removal([plan.key for plan in plans], with_needed=True)
        assert set(both.keys) == keys_of(*plans, middle, below)

    def test_a_damaged_plan_may_need_a_graph(self, vault: Vault, shop: Shop) -> None:
        path = vault.layout.manifest_file(shop.second.key)
        path.write_bytes(path.read_bytes().replace(b'"info":{}', b'"info":[]'))
        assert set(vault.plan_removal([shop.first.key], with_needed=True).keys) == keys_of(shop.first, shop.of_first)

    def test_absent_graphs_are_passed_over(self, vault: Vault, shop: Shop) -> None:
        vault.remove(vault.plan_removal([shop.of_first.key]))
        assert vault.plan_removal([shop.first.key], with_needed=True).keys == (shop.first.key,)

    def test_a_graph_of_a_pinned_plan_is_in_use(self, vault: Vault, shop: Shop) -> None:
        vault.pin(shop.first.key, "prod")
        needed = f"{shop.shared.key.short} is needed by {shop.first.key.short}, which is pinned as prod"
        with pytest.raises(EntryInUseError, match=needed):
            refuse_in_use(vault.layout, [shop.shared.key], ignore_leases=True)
        refuse_in_use(vault.layout, [shop.of_second.key])

    def test_a_graph_of_a_leased_plan_is_in_use(self, vault: Vault, shop: Shop) -> None:
        lease = vault.lease(shop.first.key)
        with pytest.raises(EntryInUseError, match="which is in use by process"):
            refuse_in_use(vault.layout, [shop.shared.key])
        refuse_in_use(vault.layout, [shop.shared.key], ignore_leases=True)
        lease.release()
        refuse_in_use(vault.layout, [shop.shared.key])


class TestBundles:
    def test_a_plan_takes_its_graphs_along(self, vault: Vault, shop: Shop, tmp_path: Path) -> None:
        report = export_bundle(vault, [shop.first.key], tmp_path / "b.zip")
        assert list(report.keys) == sorted(keys_of(shop.first, shop.shared, shop.of_first))
        other = Vault.open(tmp_path / "other")
        assert import_bundle(other, tmp_path / "b.zip") == list(report.keys)
        assert all(whole(other, entry.manifest) for entry in (shop.first, shop.shared, shop.of_first))

    def test_a_graph_goes_alone(self, vault: Vault, shop: Shop, tmp_path: Path) -> None:
        assert export_bundle(vault, [shop.shared.key], tmp_path / "b.zip").keys == (shop.shared.key,)

    def test_missing_graphs_are_named(self, vault: Vault, shop: Shop, tmp_path: Path) -> None:
        gone = [shop.shared.key, shop.of_first.key]
        vault.remove(vault.plan_removal(gone))
        with pytest.raises(UnknownKeyError, match=f"{shop.first.key.short} needs what") as caught:
            export_bundle(vault, [shop.first.key], tmp_path / "b.zip")
        assert all(key.short in str(caught.value) for key in gone)
        assert f"pipevault rm {shop.first.key.short}" in str(caught.value)
        assert not (tmp_path / "b.zip").exists()

    def test_graphs_are_published_before_plans(
        self, vault: Vault, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chain = [shop.first]
        for number in range(5):  # in no order of their keys
            chain.append(make_plan(tmp_path / "source", f"above {number}", chain[-1]))
            vault.publish(chain[-1].manifest, chain[-1].files)
        export_bundle(vault, [chain[-1].key, shop.second.key], tmp_path / "b.zip")
        other = Vault.open(tmp_path / "other")
        publish = Vault.publish

        def watching(vault: Vault, manifest: object, files: object) -> object:
            assert set(manifest.needs) <= standing(vault)  # type: ignore[attr-defined]
            return publish(vault, manifest, files)  # type: ignore[arg-type]

        monkeypatch.setattr(Vault, "publish", watching)
        import_bundle(other, tmp_path / "b.zip")
        assert len(standing(other)) == 10

    def test_one_that_lacks_a_graph_is_refused(self, vault: Vault, shop: Shop, tmp_path: Path) -> None:
        vault.remove(vault.plan_removal([shop.shared.key]))
        (tmp_path / "b.zip").write_bytes(bundle_bytes(files_of(vault)))
        other = Vault.open(tmp_path / "other")
        with pytest.raises(BundleError, match=f"it lacks entry {shop.shared.key.short}, which entry"):
            import_bundle(other, tmp_path / "b.zip")
        assert standing(other) == set()


@contextmanager
def vanishing(monkeypatch: pytest.MonkeyPatch, folder: Path, times: int) -> Iterator[list[Path]]:
    """Another process removes ``folder``, empty as it is, so many times right before a manifest is moved there."""
    from pipevault.store import publish

    publish_file = publish.publish_file  # type: ignore[attr-defined]
    removed: list[Path] = []

    def racing(source: Path, target: Path) -> None:
        if target.parent == folder and len(removed) < times:
            folder.rmdir()
            removed.append(folder)
        publish_file(source, target)

    monkeypatch.setattr(publish, "publish_file", racing)
    yield removed


def test_a_shelf_that_is_removed_while_an_entry_is_published(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = make_graph(tmp_path / "source", "unet", "1")
    with vanishing(monkeypatch, vault.layout.shelf_dir(graph.manifest.key.shelf), 3) as removed:
        vault.publish(graph.manifest, graph.files)
    assert len(removed) == 3
    assert whole(vault, graph.manifest)
