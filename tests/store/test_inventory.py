"""Reading a vault in bulk: the quick way to what a manifest names agrees with the full one, or gives way to it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.store_entries import Entry, make_entry, make_graph, make_key, make_plan
from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.errors import CorruptEntryError
from pipevault.store import inventory
from pipevault.store.inventory import _named_quickly, find_files, find_manifests, find_spread
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.places import iter_keys
from pipevault.store.vault import Vault

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.sampled_from(['"manifest_version":2,', ',"created_at":"', '"needs":["', '],"parts":']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def manifest_with(info: dict[str, object], number: int = 2, needed: int = 2) -> Manifest:
    refs = [ArtifactRef(digest_bytes(bytes([index])), index, f"unet/{index}.pt2") for index in range(number)]
    needs = tuple(digest_bytes(bytes([index, index])) for index in range(needed))
    return Manifest(make_key("a"), {}, tuple(refs), info, "2025-01-31T12:00:00+00:00", needs)


def named_by(manifest: Manifest) -> tuple[frozenset[Digest], frozenset[Digest]]:
    return frozenset(manifest.artifact_sizes), frozenset(manifest.needs)


@pytest.fixture
def published(vault: Vault, entry: Entry) -> Entry:
    vault.publish(entry.manifest, entry.files)
    return entry


@given(st.dictionaries(st.text(), PLAIN, max_size=3), st.integers(0, 3), st.integers(0, 3))
def test_the_quick_way_agrees_with_the_full_one(info: dict[str, object], number: int, needed: int) -> None:
    manifest = manifest_with(info, number, needed)
    named = _named_quickly(manifest.to_bytes(), manifest.key.digest)
    assert named in (None, named_by(manifest))


@pytest.mark.parametrize("needed", [0, 1, 5])
def test_a_usual_manifest_takes_the_quick_way(needed: int) -> None:
    manifest = manifest_with({"compile_s": 62.5}, needed=needed)
    assert _named_quickly(manifest.to_bytes(), manifest.key.digest) == named_by(manifest)


def test_what_a_manifest_needs(vault: Vault, tmp_path: Path) -> None:
    graph = make_graph(tmp_path / "source", "unet", "8x8")
    plan = make_plan(tmp_path / "source", "plan", graph)
    vault.publish(plan.manifest, plan.files)
    assert find_manifests(vault.layout)[plan.key].needs == {graph.key}
    vault.layout.manifest_file(plan.key).write_bytes(plan.manifest.to_bytes()[:-1])
    assert find_manifests(vault.layout)[plan.key].needs >= {graph.key}


@given(st.data())
def test_no_damaged_byte_passes(data: st.DataObject) -> None:
    manifest = manifest_with({"text": "words"})
    content = bytearray(manifest.to_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    assert _named_quickly(bytes(content), manifest.key.digest) is None


@pytest.mark.parametrize("info", [{"manifest_version": 2}, {"x": {"manifest_version": 3}}])
def test_a_nested_version_is_left_to_the_full_way(info: dict[str, object]) -> None:
    manifest = manifest_with(info)
    assert _named_quickly(manifest.to_bytes(), manifest.key.digest) is None


def test_a_later_format_with_a_fitting_self_digest_is_not_understood(vault: Vault, published: Entry) -> None:
    path = vault.layout.manifest_file(published.key)
    body = path.read_bytes().replace(b'"manifest_version":2', b'"manifest_version":3')
    body = body[: body.rindex(b',"self_digest"')] + b"}"
    path.write_bytes(body[:-1] + b',"self_digest":"%b"}' % digest_bytes(body).hex.encode())
    found = find_manifests(vault.layout)[published.key]
    assert not found.understood
    assert found.artifacts >= set(published.files)


def test_another_keys_manifest_is_not_understood(vault: Vault, published: Entry) -> None:
    other = digest_bytes(b"other")
    path = vault.layout.manifest_file(other)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(published.manifest.to_bytes())
    found = find_manifests(vault.layout)
    assert not found[other].understood
    assert found[other].artifacts == set(published.files)


def test_each_manifest_is_read_once(vault: Vault, published: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    open_regular = inventory.open_regular  # type: ignore[attr-defined]

    def counting(path: str) -> io.FileIO:
        reads.append(path)
        return open_regular(path)

    monkeypatch.setattr(inventory, "open_regular", counting)
    found = find_manifests(vault.layout)
    assert reads == [str(vault.layout.manifest_file(published.key))]
    assert found[published.key].size_bytes == len(published.manifest.to_bytes())


def test_keys_are_those_whose_manifests_stand_in_their_places(vault: Vault, published: Entry, tmp_path: Path) -> None:
    other = make_entry(tmp_path / "source", "b", {"unet/0.pt2": b"b"})
    vault.publish(other.manifest, other.files)
    for foreign in ("notes.txt", "zz.json", f"{'0' * 64}.json"):
        (vault.layout.manifest_file(published.key).parent / foreign).write_text("")
    (vault.layout.entries_dir / "notes").mkdir()
    for folder, name in (("0" * 16, other.key.hex), (other.key.hex[:2], other.key.hex), ("0" * 16, "f" * 48)):
        (vault.layout.entries_dir / folder).mkdir(exist_ok=True)
        (vault.layout.entries_dir / folder / f"{name}.json").write_bytes(other.manifest.to_bytes())
    paths = vault.layout.entries_dir.rglob("*")
    assert list(iter_keys(vault.layout)) == sorted(key for path in paths if (key := vault.layout.key_of_manifest(path)))


def test_an_empty_vault(vault: Vault) -> None:
    assert find_manifests(vault.layout) == {}
    assert find_spread(vault.layout, vault.layout.artifacts_dir) == {}
    assert find_files(vault.layout.quarantine_dir) == {}


def test_a_long_manifest_is_read_whole(vault: Vault, tmp_path: Path) -> None:
    entry = make_entry(tmp_path / "source", "long", {"unet/0.pt2": b"x"}, {"text": "x" * 300_000})
    vault.publish(entry.manifest, entry.files)
    assert find_manifests(vault.layout)[entry.key].size_bytes == len(entry.manifest.to_bytes())
    assert find_manifests(vault.layout)[entry.key].understood


@pytest.mark.parametrize(
    "field", [{"name": 5}, {"name": None}, {"size_bytes": -5}, {"size_bytes": "7"}, {"size_bytes": 1.5}]
)
def test_an_artifact_that_is_none_is_damage_whatever_its_digest_says(
    vault: Vault, published: Entry, field: dict[str, object]
) -> None:
    path = vault.layout.manifest_file(published.key)
    document = json.loads(path.read_bytes())
    del document["self_digest"]
    document["artifacts"][0] |= field
    document["self_digest"] = digest_bytes(canonical_json(document)).hex
    path.chmod(0o644)
    path.write_bytes(canonical_json(document))
    with pytest.raises(CorruptEntryError):
        inventory.read_published(vault.layout, published.key)


def test_a_manifest_that_is_shown_lacks_its_parts_alone(vault: Vault, published: Entry) -> None:
    assert inventory.read_published(vault.layout, published.key) == replace(published.manifest, parts={})
