"""What every kind of store does, and each with the wrappers around it: one suite, run over all of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.memory_store import MemoryStore
from helpers.store_entries import Entry, make_entry, make_graph, whole
from pipevault.digest import Digest, digest_bytes
from pipevault.errors import (
    CorruptEntryError,
    SignatureError,
    SlowTierError,
    UnsafeVaultError,
    VaultError,
    VaultFullError,
    VaultNotWritableError,
)
from pipevault.settings import Settings, Tier
from pipevault.store.tiers.folder import Folder, OwnFolder, open_vault
from pipevault.store.tiers.interface import EntryStore, Refused, TierHit
from pipevault.store.tiers.signed import Signed, TrustedKeys
from pipevault.store.tiers.timed import Timed
from pipevault.store.tiers.wrapper import Wrapper
from pipevault.store.trust.signing_keys import PrivateKey, read_private_key, write_key_pair
from pipevault.store.vault import Vault

MAX_SIZE = 100_000


@dataclass
class Made:
    """A store with one entry. ``put`` writes a file of it by its path in a vault, as nobody but an attacker does;
    ``remove`` removes one.
    """

    store: EntryStore
    vault: Vault
    """Where its files lie, or are fetched to."""
    put: Callable[[Path, bytes], None]
    remove: Callable[[Path], None]
    writable: bool = True
    lists_newest: bool = True

    def found(self, key: Digest, known: TierHit | None = None) -> TierHit:
        found = self.store.look(key, known)
        assert isinstance(found, TierHit)
        return found

    def manifest_path(self, key: Digest) -> Path:
        return self.vault.layout.manifest_file(key)

    def read(self, found: TierHit) -> Mapping[str, bytes]:
        opened = self.store.open(found)
        try:
            return {digest: file.path.read_bytes() for digest, file in opened.items()}
        finally:
            for file in opened.values():
                file.close()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def own_folder(folder: Path, entry: Entry) -> Made:
    settings = Settings(folder / "vault", max_size=MAX_SIZE)
    store = OwnFolder(Tier(settings.dir), settings, lambda create: open_vault(settings, create=create))
    store.publish(entry.manifest, entry.files)
    return Made(store, Vault.open(settings.dir), write, Path.unlink)


def other_folder(folder: Path, entry: Entry) -> Made:
    vault = Vault.open(folder / "vault")
    vault.publish(entry.manifest, entry.files)
    store = Folder(Tier(vault.root), Settings(folder / "own", max_size=MAX_SIZE))
    return Made(store, vault, write, Path.unlink)


def read_only_folder(folder: Path, entry: Entry) -> Made:
    made = other_folder(folder, entry)
    assert isinstance(made.store, Folder)
    made.store._vault = replace(made.vault, writable=False)
    return replace(made, writable=False)


def memory(folder: Path, entry: Entry) -> Made:
    store = MemoryStore(Tier(folder / "bucket"), {}, folder / "fetched")
    store.publish(entry.manifest, entry.files)
    objects = store.objects
    assert objects is not None

    def put(path: Path, data: bytes) -> None:
        objects[str(path.relative_to(store.vault.root))] = data

    def remove(path: Path) -> None:
        del objects[str(path.relative_to(store.vault.root))]

    return Made(store, store.vault, put, remove, lists_newest=False)


def signed(store: EntryStore, policy: str = "off") -> EntryStore:
    return Signed(store, policy, TrustedKeys(Settings(store.tier.dir, signature=policy)))


KINDS = {"own": own_folder, "folder": other_folder, "read-only": read_only_folder, "memory": memory}
WRAPPERS: Mapping[str, Callable[[EntryStore], EntryStore]] = {
    "bare": lambda store: store,
    "passed on": Wrapper,
    "signed": signed,
    "timed": lambda store: Timed(store, 60),
    "timed and signed": lambda store: Timed(signed(store), 60),
}


@pytest.fixture(params=[(kind, wrapper) for kind in KINDS for wrapper in WRAPPERS], ids=", ".join)
def made(request: pytest.FixtureRequest, tmp_path: Path, entry: Entry) -> Made:
    kind, wrapper = request.param
    made = KINDS[kind](tmp_path, entry)
    return replace(made, store=WRAPPERS[wrapper](made.store))


@pytest.fixture
def other(tmp_path: Path) -> Entry:
    return make_entry(tmp_path / "source", "other", {"x": b"x" * 100})


class TestReading:
    def test_an_entry_is_found_and_its_bytes_are_handed_out(self, made: Made, entry: Entry) -> None:
        found = made.found(entry.key)
        assert (found.manifest, found.tier, found.origin) == (entry.manifest, made.store.tier, made.store.tier)
        read = made.read(found)
        assert set(read) == {ref.digest.hex for ref in entry.manifest.artifacts}
        assert all(digest_bytes(data).hex == digest for digest, data in read.items())

    def test_nothing_is_found_where_nothing_is(self, made: Made, other: Entry) -> None:
        assert made.store.look(other.key) is None
        assert made.store.keys(Digest("0" * 64)) == []

    def test_the_keys_of_a_shelf(self, made: Made, entry: Entry) -> None:
        assert made.store.keys(entry.manifest.key.shelf) == [entry.key]

    def test_the_newest_entries(self, made: Made, entry: Entry) -> None:
        assert list(made.store.newest(5)) == ([entry.manifest] if made.lists_newest else [])

    def test_what_is_known_is_not_read_again(self, made: Made, entry: Entry) -> None:
        known = made.found(entry.key)
        assert made.found(entry.key, known).manifest is known.manifest

    def test_what_was_replaced_is_read_again(self, made: Made, entry: Entry) -> None:
        known = made.found(entry.key)
        later = replace(entry.manifest, created_at="2025-02-01T12:00:00+00:00")
        made.put(made.manifest_path(entry.key), later.to_bytes())
        assert made.found(entry.key, known).manifest == later

    def test_what_is_gone_is_known_no_more(self, made: Made, entry: Entry) -> None:
        known = made.found(entry.key)
        made.remove(made.manifest_path(entry.key))
        assert made.store.look(entry.key, known) is None

    def test_a_damaged_manifest_is_refused(self, made: Made, entry: Entry) -> None:
        known = made.found(entry.key)
        made.put(made.manifest_path(entry.key), b"{")
        for refused in (made.store.look(entry.key), made.store.look(entry.key, known)):
            assert isinstance(refused, Refused)
            assert isinstance(refused.error, CorruptEntryError)
            assert str(made.store.tier.dir) in refused.text

    def test_damaged_or_missing_bytes_are_not_handed_out(self, made: Made, entry: Entry) -> None:
        found = made.found(entry.key)
        path = made.vault.layout.artifact_file(entry.manifest.artifacts[0].digest)
        made.put(path, b"other bytes")
        with pytest.raises(CorruptEntryError, match="damaged"):
            made.store.open(found)
        made.remove(path)
        with pytest.raises(CorruptEntryError, match="missing"):
            made.store.open(found)

    def test_after_an_error_it_is_asked_again(self, made: Made, entry: Entry) -> None:
        made.found(entry.key)
        made.store.forget()
        made.found(entry.key)


class TestWriting:
    def test_it_is_written_or_says_that_it_cannot_be(self, made: Made, entry: Entry, other: Entry) -> None:
        found = made.found(entry.key)
        assert (made.store.is_writable(), made.store.accepts(found)) == (made.writable, made.writable)
        if made.writable:
            assert made.store.publish(other.manifest, other.files).manifest == other.manifest
            assert set(made.read(made.found(other.key))) == {other.manifest.artifacts[0].digest.hex}
        else:
            with pytest.raises(VaultNotWritableError):
                made.store.publish(other.manifest, other.files)
            assert made.store.look(other.key) is None

    def test_an_entry_is_copied_from_it(self, made: Made, entry: Entry, tmp_path: Path) -> None:
        settings = Settings(tmp_path / "target")
        target = OwnFolder(Tier(settings.dir), settings, lambda create: open_vault(settings, create=create))
        assert target.accepts(made.found(entry.key))
        made.store.copy(made.found(entry.key), target)
        assert whole(Vault.open(settings.dir), entry.manifest)

    def test_an_entry_is_copied_to_it(self, made: Made, other: Entry, tmp_path: Path) -> None:
        source = other_folder(tmp_path / "source of copies", other)
        copy = partial(source.store.copy, source.found(other.key), made.store)
        if not made.writable:
            with pytest.raises(VaultNotWritableError):
                copy()
            return
        copy()
        assert set(made.read(made.found(other.key))) == {other.manifest.artifacts[0].digest.hex}

    def test_damaged_bytes_are_not_copied(self, made: Made, entry: Entry, tmp_path: Path) -> None:
        found = made.found(entry.key)
        made.put(made.vault.layout.artifact_file(entry.manifest.artifacts[0].digest), b"other bytes")
        target = MemoryStore(Tier(tmp_path / "target"), {}, tmp_path / "target")
        with pytest.raises(CorruptEntryError):
            made.store.copy(found, target)
        assert target.objects == {}

    def test_a_use_is_noted_or_quietly_not(self, made: Made, entry: Entry) -> None:
        lease = made.store.hold(made.found(entry.key))
        assert lease.held == made.writable
        assert made.vault.layout.use_file(entry.key).exists() == made.writable
        lease.release()
        if made.vault.layout.leases_dir.exists():
            assert os.listdir(made.vault.layout.leases_dir) == []

    def test_what_was_removed_meanwhile_is_not_held(self, made: Made, entry: Entry) -> None:
        found = made.found(entry.key)
        found.path.unlink()
        with pytest.raises(CorruptEntryError, match="removed"):
            made.store.hold(found)

    def test_a_bad_file_is_set_aside_where_that_is_possible(self, made: Made, entry: Entry) -> None:
        found = made.found(entry.key)
        moved = made.store.set_aside(found.vault, found.path, "damaged")
        assert (moved is not None) == made.writable == (not found.path.exists())

    def test_room_is_made_only_where_a_limit_is_passed(self, made: Made, entry: Entry) -> None:
        assert made.store.limit_size(made.found(entry.key)) == ()
        made.found(entry.key)


@pytest.mark.parametrize("kind", [own_folder, other_folder])
def test_a_folder_takes_no_copy_that_is_larger_than_it_may_be(
    kind: Callable[[Path, Entry], Made], tmp_path: Path, entry: Entry
) -> None:
    made = kind(tmp_path, entry)
    found = made.found(entry.key)
    large = make_entry(tmp_path / "source", "large", {"x": bytes(MAX_SIZE + 1)})
    with pytest.raises(VaultFullError, match="max_size"):
        made.store.accepts(replace(found, manifest=large.manifest))


def test_a_folder_that_was_never_asked_takes_no_copy(tmp_path: Path, entry: Entry) -> None:
    """It may be one that never answers."""
    made = other_folder(tmp_path, entry)
    found = made.found(entry.key)
    made.store.forget()
    assert not made.store.accepts(found)


def test_an_own_folder_is_made_for_what_is_written_and_not_for_what_is_read(tmp_path: Path, entry: Entry) -> None:
    settings = Settings(tmp_path / "own")
    store = OwnFolder(Tier(settings.dir), settings, lambda create: open_vault(settings, create=create))
    assert (store.look(entry.key), store.keys(entry.manifest.key.shelf), list(store.newest(5))) == (None, [], [])
    assert not store.is_writable()
    assert not settings.dir.exists()
    store.publish(entry.manifest, entry.files)
    assert whole(Vault.open(settings.dir), entry.manifest)


def test_a_folder_that_went_away_is_no_empty_one(tmp_path: Path, entry: Entry, other: Entry) -> None:
    made = other_folder(tmp_path, entry)
    made.found(entry.key)
    made.vault.root.rename(tmp_path / "away")
    assert isinstance(made.store.look(other.key), Refused)
    with pytest.raises(VaultError):
        made.store.keys(entry.manifest.key.shelf)


def test_an_error_of_the_file_system_gets_the_name_of_the_place(
    tmp_path: Path, entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = memory(tmp_path, entry)

    def stale(shelf: Digest) -> list[Digest]:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(made.store, "keys", stale)
    with pytest.raises(VaultError, match=r"bucket cannot be read.*Stale file handle"):
        Wrapper(made.store).keys(entry.manifest.key.shelf)


class TestTimed:
    QUESTIONS: Mapping[str, Callable[[EntryStore, TierHit], object]] = {
        "look": lambda store, found: store.look(found.key),
        "keys": lambda store, found: store.keys(found.key),
        "newest": lambda store, found: store.newest(5),
        "open": lambda store, found: store.open(found),
        "is_writable": lambda store, found: store.is_writable(),
        "publish": lambda store, found: store.publish(found.manifest, {}),
        "copy": lambda store, found: store.copy(found, store),
        "hold": lambda store, found: store.hold(found),
        "limit_size": lambda store, found: store.limit_size(found),
        "set_aside": lambda store, found: store.set_aside(found.vault, found.path, ""),
    }

    @pytest.mark.parametrize("question", QUESTIONS)
    def test_a_store_that_does_not_answer_is_left_out_for_a_while(
        self, question: str, tmp_path: Path, entry: Entry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = memory(tmp_path, entry)
        found = made.found(entry.key)
        let_go = threading.Event()
        monkeypatch.setattr(made.store, question, lambda *given, **more: let_go.wait())
        monkeypatch.setattr("pipevault.store.tiers.deadline.MIN_BYTES_PER_S", 1 << 40)
        store = Timed(made.store, 0.05)
        with pytest.raises(SlowTierError, match="did not answer within"):
            self.QUESTIONS[question](store, found)
        for other in self.QUESTIONS.values():
            with pytest.raises(SlowTierError, match="is left out"):
                other(Timed(made.store, 60), found)
        let_go.set()

    def test_whether_it_takes_a_copy_is_not_asked_of_what_may_hang(self) -> None:
        """These two answer from memory, so they run in the thread that asks."""
        assert {"accepts", "forget"} == {
            name for name in vars(EntryStore) if not name.startswith("_") and name not in self.QUESTIONS
        }

    def test_the_newest_are_read_for_half_of_the_time(
        self, tmp_path: Path, entry: Entry, other: Entry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = other_folder(tmp_path, entry)
        made.store.publish(other.manifest, other.files)
        for read_s, count in ((29, 2), (31, 1)):
            times = iter([0, read_s, read_s])
            monkeypatch.setattr(
                "pipevault.store.tiers.timed.time", SimpleNamespace(monotonic=lambda times=times: next(times))
            )
            assert len(list(Timed(signed(made.store), 60).newest(5))) == count


class TestSigned:
    @pytest.fixture
    def private(self, tmp_path: Path) -> PrivateKey:
        (tmp_path / "keys").mkdir(mode=0o700)
        write_key_pair(tmp_path / "keys" / "key")
        return read_private_key(tmp_path / "keys" / "key")

    @pytest.fixture(params=[other_folder, memory])
    def made(self, request: pytest.FixtureRequest, tmp_path: Path, entry: Entry) -> Made:
        made: Made = request.param(tmp_path, entry)
        return made

    def sign(self, made: Made, entry: Entry, private: PrivateKey) -> None:
        made.found(entry.key)
        made.store.open(made.found(entry.key))
        made.vault.sign(entry.manifest, private)
        path = made.vault.layout.signature_file(entry.key, private.public.id)
        made.put(path, path.read_bytes())

    def store(self, made: Made, policy: str, private: PrivateKey | None) -> Signed:
        trusted = (private.public.text,) if private else ()
        return Signed(made.store, policy, TrustedKeys(Settings(made.store.tier.dir, trusted_keys=trusted)))

    def test_each_policy(self, made: Made, entry: Entry, private: PrivateKey) -> None:
        off = self.store(made, "off", private).look(entry.key)
        assert isinstance(off, TierHit)
        assert (off.warning, off.signed) == ("", False)
        warned = self.store(made, "warn", private).look(entry.key)
        assert isinstance(warned, TierHit)
        assert "no signature" in warned.warning
        refused = self.store(made, "require", private).look(entry.key)
        assert isinstance(refused, Refused)
        assert isinstance(refused.error, SignatureError)
        self.sign(made, entry, private)
        found = self.store(made, "require", private).look(entry.key)
        assert isinstance(found, TierHit)
        assert (found.warning, found.signed) == ("", True)

    def test_what_is_known_is_judged_again(self, made: Made, entry: Entry, private: PrivateKey) -> None:
        """It may have been found where no signature was asked for, or other keys were trusted."""
        known = self.store(made, "off", private).look(entry.key)
        assert isinstance(known, TierHit)
        assert isinstance(self.store(made, "require", private).look(entry.key, known), Refused)
        assert isinstance(self.store(made, "require", private).look(entry.key, replace(known, signed=True)), Refused)
        self.sign(made, entry, private)
        found = self.store(made, "require", private).look(entry.key)
        assert isinstance(found, TierHit)
        assert isinstance(self.store(made, "require", None).look(entry.key, found), Refused)

    def test_only_what_is_signed_is_copied_where_that_is_required(
        self, made: Made, entry: Entry, private: PrivateKey, tmp_path: Path
    ) -> None:
        target = MemoryStore(Tier(tmp_path / "target"), {}, tmp_path / "target")
        strict = Signed(target, "require", TrustedKeys(Settings(tmp_path, trusted_keys=(private.public.text,))))
        with pytest.raises(VaultError, match="takes signed entries only"):
            strict.accepts(made.found(entry.key))
        self.sign(made, entry, private)
        assert strict.accepts(made.found(entry.key))
        self.store(made, "off", private).copy(made.found(entry.key), strict)
        assert isinstance(strict.look(entry.key), TierHit)


class TestOwnership:
    """Of a folder; what a store fetches is this user's own."""

    @pytest.fixture
    def private(self, tmp_path: Path) -> PrivateKey:
        (tmp_path / "keys").mkdir(mode=0o700)
        write_key_pair(tmp_path / "keys" / "key")
        return read_private_key(tmp_path / "keys" / "key")

    @pytest.fixture
    def made(self, tmp_path: Path, entry: Entry, private: PrivateKey) -> Made:
        """A signed entry, whose files everybody may write."""
        made = other_folder(tmp_path, entry)
        made.vault.sign(entry.manifest, private)
        for path in made.vault.root.rglob("*"):
            path.chmod(path.stat().st_mode | 0o002)
        return made

    def test_without_a_wrapper_that_vouches_it_is_not_opened(self, made: Made, entry: Entry) -> None:
        found = made.found(entry.key)
        assert isinstance(found.unowned, UnsafeVaultError)
        with pytest.raises(UnsafeVaultError):
            made.store.open(found)

    @pytest.mark.parametrize("policy", ["off", "warn", "require"])
    def test_a_signature_stands_for_it(self, made: Made, entry: Entry, private: PrivateKey, policy: str) -> None:
        keys = TrustedKeys(Settings(made.vault.root, trusted_keys=(private.public.text,)))
        made = replace(made, store=Signed(made.store, policy, keys))
        found = made.found(entry.key)
        assert found.signed
        assert set(made.read(found)) == {ref.digest.hex for ref in entry.manifest.artifacts}

    def test_without_one_it_is_refused(self, made: Made, entry: Entry) -> None:
        refused = signed(made.store).look(entry.key)
        assert isinstance(refused, Refused)
        assert isinstance(refused.error, UnsafeVaultError)

    def test_what_is_known_is_refused_once_its_owner_is_not_trusted(self, tmp_path: Path, entry: Entry) -> None:
        vault = Vault.open(tmp_path / "vault")
        vault.publish(entry.manifest, entry.files)
        vault.layout.manifest_file(entry.key).chmod(0o664)
        lax = Settings(tmp_path / "own", allow_group_write=True)
        known = signed(Folder(Tier(vault.root), lax)).look(entry.key)
        assert isinstance(known, TierHit)
        strict = signed(Folder(Tier(vault.root), Settings(tmp_path / "own")))
        assert isinstance(strict.look(entry.key, known), Refused)


def test_the_shelf_of_a_part(tmp_path: Path) -> None:
    graphs = sorted((make_graph(tmp_path / "source", "unet", text) for text in "12"), key=lambda entry: entry.key)
    for kind in (own_folder, other_folder, memory):
        made = kind(tmp_path / kind.__name__, graphs[0])
        made.store.publish(graphs[1].manifest, graphs[1].files)
        assert made.store.keys(graphs[0].manifest.key.shelf) == [graph.key for graph in graphs]
