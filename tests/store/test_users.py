"""Real users who share a vault: a builder and workers with other ids, with and without a group, a signature, a name."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from helpers.mounts import in_child
from helpers.store_entries import Entry, make_entry, read_artifacts
from pipevault.errors import SignatureError, UnsafeVaultError, VaultError
from pipevault.settings import Settings
from pipevault.store.locks.leases import live_leases
from pipevault.store.retention.prune import carry_out, plan_prune
from pipevault.store.tiers import Tiers
from pipevault.store.trust.signing_keys import PrivateKey, read_private_key, write_key_pair
from pipevault.store.vault import Vault

pytestmark = pytest.mark.root

for name in ("grp", "pwd", "encodings.ascii", "pipevault.store.trust.signature"):
    import_module(name)  # other users may not read the interpreter's own folder

BUILDER, WORKER, STRANGER = 54001, 54002, 54003
"""Numbers without an entry in passwd, so without a home."""
TEAM = 54100
SQUASHED = 65534
"""What root's files belong to on a file server that squashes root."""


def as_user(user: int, function: Callable[[], object], *, groups: tuple[int, ...] = (), umask: int = 0o022) -> None:
    """Run ``function`` as ``user`` in a process of its own, whose environment has no HOME."""

    def run() -> None:
        os.setgroups(list(groups))
        os.setgid(user)
        os.setuid(user)
        os.umask(umask)
        os.environ.pop("HOME", None)
        os.environ.pop("XDG_STATE_HOME", None)
        function()

    assert in_child(run) == 0


@pytest.fixture
def place(open_folder: Path) -> Path:
    """A folder where every user may make a vault of its own."""
    place = open_folder / "place"
    place.mkdir()
    place.chmod(0o1777)
    return place


@pytest.fixture
def entry(open_folder: Path) -> Entry:
    entry = make_entry(open_folder / "source", "a", {"graph.so": b"graph" * 500})
    for path in (open_folder / "source").rglob("*"):
        path.chmod(0o644)
    return entry


@pytest.fixture
def private(open_folder: Path) -> PrivateKey:
    write_key_pair(open_folder / "signing.key", comment="")
    return read_private_key(open_folder / "signing.key")


def build(settings: Settings, entry: Entry) -> None:
    Vault.of(settings, create=True).publish(entry.manifest, entry.files)


def load(settings: Settings, entry: Entry) -> None:
    """What a load does. Raises why it cannot."""
    tiers = Tiers(settings)
    found = next(iter(tiers.candidates(entry.key)))
    if isinstance(error := getattr(found, "error", None), VaultError):
        raise error
    lease = tiers.hold(found)  # type: ignore[arg-type]
    assert all(data == b"graph" * 500 for data in read_artifacts(tiers, found).values())  # type: ignore[arg-type]
    lease.release()


def refused(settings: Settings, entry: Entry, error: type[Exception], words: str) -> Callable[[], None]:
    def run() -> None:
        with pytest.raises(error, match=words):
            load(settings, entry)

    return run


class TestOwned:
    def test_another_users_vault_is_not_loaded_from(self, place: Path, entry: Entry) -> None:
        settings = Settings(place / "vault")
        as_user(BUILDER, lambda: build(settings, entry))
        as_user(BUILDER, lambda: load(settings, entry))
        words = rf"belongs to user {BUILDER}.*trusted_users.*trusted_keys"
        as_user(WORKER, refused(settings, entry, UnsafeVaultError, words))

    def test_a_trusted_users_vault_is(self, place: Path, entry: Entry) -> None:
        settings = Settings(place / "vault")
        as_user(BUILDER, lambda: build(settings, entry))
        trusting = replace(settings, trusted_users=(str(BUILDER),))
        as_user(WORKER, lambda: load(trusting, entry))
        as_user(WORKER, refused(replace(settings, trusted_users=(str(STRANGER),)), entry, UnsafeVaultError, "belongs"))

    def test_a_trusted_user_is_trusted_by_name(self, place: Path, entry: Entry) -> None:
        build(Settings(place / "vault"), entry)  # root's
        nobody = Settings(place / "vault", trusted_users=("root",), trusted_groups=("root",))
        as_user(WORKER, lambda: load(nobody, entry))

    def test_an_unknown_name_is_told(self, place: Path) -> None:
        with pytest.raises(Exception, match="names 'nobody-of-this-name', but this machine has no such user"):
            Vault.of(Settings(place / "vault", trusted_users=("nobody-of-this-name",)), create=True)

    def test_a_squashed_root_is_not_trusted_unless_named(self, place: Path, entry: Entry) -> None:
        settings = Settings(place / "vault")
        build(settings, entry)
        for path in (place / "vault", *(place / "vault").rglob("*")):
            os.chown(path, SQUASHED, SQUASHED)
        as_user(WORKER, refused(settings, entry, UnsafeVaultError, "does not map"))
        as_user(WORKER, lambda: load(replace(settings, trusted_users=(str(SQUASHED),)), entry))


class TestSigned:
    def signed(self, place: Path, entry: Entry, private: PrivateKey) -> Settings:
        """A vault of the builder's, signed, that everybody may write."""
        settings = Settings(place / "vault", trusted_keys=(private.public.text,))
        as_user(BUILDER, lambda: build(Settings(place / "vault"), entry))
        vault = Vault.of(replace(settings, trusted_users=(str(BUILDER),)))
        vault.sign(entry.manifest, private)
        for path in (place / "vault", *(place / "vault").rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        return settings

    @pytest.mark.parametrize("policy", ["off", "warn", "require"])
    def test_owner_and_mode_do_not_matter(self, place: Path, entry: Entry, private: PrivateKey, policy: str) -> None:
        settings = replace(self.signed(place, entry, private), signature=policy)
        as_user(WORKER, lambda: load(settings, entry))
        as_user(WORKER, refused(replace(settings, trusted_keys=()), entry, (UnsafeVaultError, SignatureError), ""))  # type: ignore[arg-type]

    def test_other_bytes_are_refused(self, place: Path, entry: Entry, private: PrivateKey) -> None:
        settings = self.signed(place, entry, private)
        [ref] = entry.manifest.artifacts
        artifact = Vault.open(place / "vault").layout.artifact_file(ref.digest)
        artifact.write_bytes(b"other" * 500)
        as_user(WORKER, refused(settings, entry, VaultError, "damaged"))

    def test_another_manifest_is_refused(self, place: Path, entry: Entry, private: PrivateKey) -> None:
        settings = self.signed(place, entry, private)
        layout = Vault.open(place / "vault").layout
        other = replace(entry.manifest, info={"edited": True})
        layout.manifest_file(entry.key).write_bytes(other.to_bytes())
        as_user(WORKER, refused(settings, entry, UnsafeVaultError, "not trusted"))

    def test_it_is_copied_to_a_vault_of_the_workers_own(self, place: Path, entry: Entry, private: PrivateKey) -> None:
        from pipevault.settings import Tier

        settings = self.signed(place, entry, private)
        own = replace(settings, dir=place / "own", tiers=(Tier(place / "own"), Tier(place / "vault")))

        def copy() -> None:
            tiers = Tiers(own)
            found = tiers.lookup(entry.key)
            assert found is not None
            assert found.signed
            copied = tiers.copy_nearer(found)
            assert copied.vault.root == place / "own"
            assert not tiers.lookup(entry.key).signed

        as_user(WORKER, copy)


def test_a_signed_entry_with_a_foreign_artifact(place: Path, entry: Entry, private: PrivateKey) -> None:
    settings = Settings(place / "vault", trusted_keys=(private.public.text,), signature="require")
    as_user(WORKER, lambda: build(Settings(place / "vault"), entry))
    vault = Vault.of(replace(settings, trusted_users=(str(WORKER),)))
    vault.sign(entry.manifest, private)
    [ref] = entry.manifest.artifacts
    os.chown(vault.layout.artifact_file(ref.digest), STRANGER, STRANGER)
    as_user(WORKER, lambda: load(settings, entry))
    as_user(WORKER, refused(Settings(place / "vault"), entry, UnsafeVaultError, "belongs"))


class TestSharedByAGroup:
    @pytest.mark.parametrize("umask", [0o077, 0o002, 0o022])
    def test_members_build_load_hold_and_prune(self, place: Path, entry: Entry, open_folder: Path, umask: int) -> None:
        team = place / "team"
        team.mkdir()
        os.chown(team, 0, TEAM)
        team.chmod(0o2775)
        settings = Settings(team / "vault", shared="group")
        other = make_entry(open_folder / "source", "b", {"graph.so": b"graph" * 500})
        for path in (open_folder / "source").rglob("*"):
            path.chmod(0o644)
        member: dict[str, Any] = {"groups": (TEAM,), "umask": umask}
        as_user(BUILDER, lambda: build(settings, entry), **member)
        as_user(WORKER, lambda: load(settings, entry), **member)
        as_user(WORKER, lambda: build(settings, other), **member)
        as_user(BUILDER, lambda: load(settings, other), **member)
        for path in (team / "vault", *(team / "vault").rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert path.stat().st_gid == TEAM, path
            if path.is_dir():
                assert mode == 0o2775, path
            elif path.parent.name not in ("leases", "locks", "events", "uses") and path.parent.parent.name != "uses":
                assert mode == 0o664, path

        def remove_all() -> None:
            vault = Vault.of(settings)
            carry_out(vault, plan_prune(vault, max_size=0))
            assert list(vault.manifests()) == []
            assert live_leases(vault.layout).keys() == set()

        as_user(BUILDER, remove_all, **member)

    def test_who_is_no_member_may_not_write_and_trusts_nobody(self, place: Path, entry: Entry) -> None:
        team = place / "team"
        team.mkdir()
        os.chown(team, 0, TEAM)
        team.chmod(0o2775)
        settings = Settings(team / "vault", shared="group")
        as_user(BUILDER, lambda: build(settings, entry), groups=(TEAM,))
        as_user(STRANGER, refused(Settings(team / "vault"), entry, UnsafeVaultError, "belongs|can be written"))
        # Not even if it says that the vault is shared: the group is not its own.
        as_user(STRANGER, refused(settings, entry, UnsafeVaultError, "belongs|can be written"))
        as_user(STRANGER, lambda: load(replace(settings, trusted_groups=(str(TEAM),)), entry))

        def cannot_write() -> None:
            assert not Vault.of(settings).writable

        as_user(STRANGER, cannot_write)

    def test_a_strangers_vault_is_not_trusted_for_its_group(self, place: Path, entry: Entry) -> None:
        settings = Settings(place / "vault", shared="group")
        as_user(STRANGER, lambda: build(settings, entry))
        as_user(WORKER, refused(settings, entry, UnsafeVaultError, f"belongs to user {STRANGER}"), groups=(TEAM,))

    def test_a_group_that_a_folder_gave_is_no_proof_of_membership(self, place: Path, entry: Entry) -> None:
        os.chown(place, 0, TEAM)
        place.chmod(0o3777)
        as_user(STRANGER, lambda: build(Settings(place / "vault"), entry))
        assert (place / "vault").stat().st_gid == TEAM
        trusting = Settings(place / "vault", trusted_groups=(str(TEAM),))
        as_user(WORKER, refused(trusting, entry, UnsafeVaultError, "whether that is a member"))

    def test_members_take_one_anothers_locks_whatever_the_umask(self, place: Path, entry: Entry) -> None:
        team = place / "team"
        team.mkdir()
        os.chown(team, 0, TEAM)
        team.chmod(0o2775)
        settings = Settings(team, shared="group")  # an administrator's folder, which a member may not chmod

        def lock() -> None:
            vault = Vault.of(settings, create=True)
            vault.pin(entry.key, "prod") if vault.lookup(entry.key) else vault.publish(entry.manifest, entry.files)
            with vault.lock(entry.key, timeout_s=0):
                pass

        for user in (BUILDER, WORKER):
            as_user(user, lock, groups=(TEAM,), umask=0o077)
        assert stat.S_IMODE((team / "pins" / "prod.json").stat().st_mode) == 0o664

    def test_without_it_nothing_is_the_groups(self, place: Path, entry: Entry) -> None:
        as_user(BUILDER, lambda: build(Settings(place / "vault"), entry), umask=0o002)
        assert not [path for path in (place / "vault").rglob("*") if path.stat().st_mode & stat.S_IWGRP]


def test_a_reader_who_may_not_write_needs_no_home(place: Path, entry: Entry) -> None:
    settings = Settings(place / "vault", trusted_users=(str(BUILDER),))
    as_user(BUILDER, lambda: build(settings, entry))
    before = sorted((place / "vault").rglob("*"))
    as_user(STRANGER, lambda: load(settings, entry))
    assert sorted((place / "vault").rglob("*")) == before
