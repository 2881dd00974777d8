"""Manifests and bundles that were changed in any way are refused with the right error, or mean what they meant."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.bundles import Files, bundle_bytes, everything_below, files_of
from helpers.store_entries import make_entry, whole
from pipevault.errors import BundleError, CorruptEntryError, NewerVaultError
from pipevault.store.bundle import export_bundle, import_bundle
from pipevault.store.bundle.zip_file import MARKER
from pipevault.store.check import verify
from pipevault.store.manifest import Manifest
from pipevault.store.trust.signing_keys import PrivateKey
from pipevault.store.vault import Vault

FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = ("../evil", "/tmp/evil", "vault.json", "entries/../../evil", "artifacts/aa", "pins/a.json", "")


class Origin:
    """A vault with two signed entries, and the bundle of it."""

    def __init__(self, folder: Path) -> None:
        self.vault = Vault.open(folder / "vault")
        self.entries = [
            make_entry(folder / "source", "a", {"unet/0.pt2": b"shared" * 40, "vae/0.pt2": b"own" * 30}),
            make_entry(folder / "source", "b", {"unet/0.pt2": b"shared" * 40, "empty": b""}),
        ]
        key = PrivateKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
        for entry in self.entries:
            self.vault.publish(entry.manifest, entry.files)
            self.vault.sign(entry.manifest, key)
        path = folder / "whole.zip"
        export_bundle(self.vault, [entry.key for entry in self.entries], path)
        self.bundle = path.read_bytes()
        self.files = files_of(self.vault)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Origin:
    return Origin(tmp_path_factory.mktemp("origin"))


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """``data`` with up to four changes: a byte, a piece removed, repeated, moved or put in."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        end = draw(st.integers(start, min(start + draw(st.sampled_from([1, 8, 200, 10**6])), len(data))))
        piece, rest = data[start:end], data[:start] + data[end:]
        how = draw(st.sampled_from(["flip", "remove", "cut", "repeat", "move", "insert", "zero"]))
        if how == "flip" and data:
            data = data[:start] + bytes([data[start] ^ draw(st.integers(1, 255))]) + data[start + 1 :]
        elif how == "remove":
            data = rest
        elif how == "cut":
            data = data[:start]
        elif how == "repeat":
            data = data[:end] + piece + data[end:]
        elif how == "move":
            to = draw(st.integers(0, len(rest)))
            data = rest[:to] + piece + rest[to:]
        elif how == "insert":
            data = data[:start] + draw(st.binary(min_size=1, max_size=30)) + data[start:]
        else:
            data = data[:start] + bytes(len(piece)) + data[end:]
    return data


def refused_or_equal(origin: Origin, data: bytes) -> bool:
    """Import ``data`` into a new vault: either it is refused and nothing at all happens, or what is there is what was
    exported. Whether it was refused.
    """
    with tempfile.TemporaryDirectory(prefix="bundles-fuzz-") as name:
        folder = Path(name)
        vault, path = Vault.open(folder / "in" / "vault"), folder / "x.zip"
        path.write_bytes(data)
        before = everything_below(folder)
        try:
            imported = import_bundle(vault, path)
        except BundleError:
            assert everything_below(folder) == before
            return True
        assert {child.relative_to(folder).parts[:2] for child in folder.rglob("*") if child.is_file()} == {
            ("in", "vault"),
            ("x.zip",),
        }
        assert set(files_of(vault)) <= set(origin.files)
        known = {entry.key: entry for entry in origin.entries}
        assert imported
        assert all(whole(vault, known[key].manifest) for key in imported)
        assert verify(vault).findings == ()
        return False


@FUZZ
@given(data=st.data())
def test_a_bundle_whose_bytes_were_changed(origin: Origin, data: st.DataObject) -> None:
    changed = data.draw(changed_bytes(origin.bundle))
    assert refused_or_equal(origin, changed) is (changed != origin.bundle)


@st.composite
def changed_members(draw: st.DrawFn, files: Files) -> Files:
    """Members dropped, repeated, renamed, swapped, reordered or with changed bytes."""
    members = list(files)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(members) - 1))
        name, content = members[place]
        how = draw(st.sampled_from(["drop", "repeat", "rename", "swap", "reorder", "change", "add", "place"]))
        other = draw(st.integers(0, len(members) - 1))
        if how == "drop" and len(members) > 1:
            del members[place]
        elif how == "repeat":
            members.insert(other, (name, content))
        elif how == "rename":
            members[place] = (
                draw(st.sampled_from(NAMES) | st.text(st.characters(codec="ascii"), max_size=80)),
                content,
            )
        elif how == "swap":
            members[place], members[other] = (name, members[other][1]), (members[other][0], content)
        elif how == "reorder":
            members = draw(st.permutations(members))
        elif how == "change":
            members[place] = (name, draw(changed_bytes(content)))
        elif how == "place":  # the place of another key or digest
            digest = draw(st.text("0123456789abcdef", min_size=64, max_size=64))
            folder = draw(st.sampled_from(["entries", "artifacts"]))
            suffix = ".json" if folder == "entries" else ""
            members[place] = (f"{folder}/{digest[:2]}/{digest}{suffix}", content)
        else:
            members.insert(place, (draw(st.sampled_from(NAMES)), draw(st.binary(max_size=20))))
    return members


@FUZZ
@given(data=st.data())
def test_a_bundle_put_together_anew_with_true_digests(origin: Origin, data: st.DataObject) -> None:
    """The attacker's container is perfect, so only what the members are can give the bundle away."""
    members = data.draw(changed_members(origin.files))
    if data.draw(st.booleans()):
        members = sorted(members)
    # A signature is not the bundle's to judge: it is read where an entry is loaded.
    known = dict(origin.files)
    if any(name.startswith("signatures/") and known.get(name) != content for name, content in members):
        return
    refused_or_equal(origin, bundle_bytes(members))


@FUZZ
@given(data=st.data())
def test_a_bundle_with_another_directory(origin: Origin, data: st.DataObject) -> None:
    """One container's members with another's directory, or with a few bytes of its own changed."""
    members = data.draw(st.just(origin.files) | changed_members(origin.files))
    start = origin.bundle.index(b"PK\x01\x02")
    other = bundle_bytes(members)
    directory = data.draw(st.just(other[other.index(b"PK\x01\x02") :]) | changed_bytes(origin.bundle[start:]))
    refused_or_equal(origin, origin.bundle[:start] + directory)


@FUZZ
@given(marker=st.binary(max_size=40) | st.just(b'{"pipevault_vault":3}'))
def test_a_bundle_with_another_marker(origin: Origin, marker: bytes) -> None:
    assert refused_or_equal(origin, bundle_bytes(origin.files, marker=marker)) is (marker != MARKER)


@FUZZ
@given(content=st.binary(max_size=400))
def test_anything_else_is_no_bundle(origin: Origin, content: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="bundles-fuzz-") as name:
        path = Path(name) / "x.zip"
        path.write_bytes(content)
        with pytest.raises(BundleError):
            import_bundle(origin.vault, path)


@FUZZ
@given(data=st.data())
def test_a_manifest_whose_bytes_were_changed(origin: Origin, data: st.DataObject) -> None:
    entry = origin.entries[0]
    content = entry.manifest.to_bytes()
    changed = data.draw(changed_bytes(content))
    path = origin.vault.layout.manifest_file(entry.key)
    path.write_bytes(changed)
    try:
        if changed == content:
            return
        with pytest.raises((CorruptEntryError, NewerVaultError)):
            origin.vault.lookup(entry.key)
        [finding] = [finding for finding in verify(origin.vault).bad if finding.path == path]
        assert finding.keys == (entry.key,)
    finally:
        path.write_bytes(content)


@FUZZ
@given(data=st.data())
def test_a_manifest_at_another_place(origin: Origin, data: st.DataObject) -> None:
    """Swapped files, and whatever else is put there whose own digests are true."""
    first, second = origin.entries
    other = Manifest(
        data.draw(st.sampled_from([first.manifest.key, second.manifest.key])),
        data.draw(st.dictionaries(st.text(max_size=5), st.integers(), max_size=2)),
        (),
        {},
        "2026-01-01T00:00:00+00:00",
    )
    found = data.draw(st.sampled_from([other, second.manifest]))
    path = origin.vault.layout.manifest_file(first.key)
    content = path.read_bytes()
    path.write_bytes(found.to_bytes())
    try:
        if found.key.digest == first.key:
            assert origin.vault.lookup(first.key) == found, "without a signature nothing tells who wrote it"
            assert [finding.kind for finding in verify(origin.vault).bad] == ["signature"]
        else:
            with pytest.raises(CorruptEntryError, match="belongs to key"):
                origin.vault.lookup(first.key)
            assert path in [finding.path for finding in verify(origin.vault).bad]
    finally:
        path.write_bytes(content)
