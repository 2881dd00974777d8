"""The folders above a vault: who could put another vault in its place. Where root allows, with real other users."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.store_entries import Entry, make_entry
from pipevault.errors import UnsafeVaultError
from pipevault.settings import ownership
from pipevault.settings.ownership import Trust, open_owned
from pipevault.store.trust.owners import check_ownership, check_root
from pipevault.store.vault import Vault

NOBODY, SOMEBODY = 65534, 4242

LOAD = """
try:
    vault = Vault.open(Path(arguments[0]), create=False)
    manifest = vault.lookup(Digest(arguments[1]))
    print("loaded", [vault.verified_path(ref).name for ref in manifest.artifacts] != [])
except PipevaultError as error:
    print(type(error).__name__, error)
"""

AS_USER = """
import ctypes, os, sys
from pathlib import Path
from pipevault.digest import Digest
from pipevault.errors import PipevaultError
from pipevault.store.vault import Vault
_, user, namespace, code, *arguments = sys.argv
os.setgroups([])
os.setgid(int(user))
os.setuid(int(user))
if namespace:
    PR_SET_DUMPABLE, CLONE_NEWUSER = 4, 0x10000000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) or libc.unshare(CLONE_NEWUSER):
        sys.exit(f"no user namespaces: {os.strerror(ctypes.get_errno())}")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
exec(code)
"""
"""Imports before it changes the user, who may have no access to this Python."""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can enter, which pytest's own are not; everything in it may be chowned."""
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="pipevault-test-")))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def above(tmp_path: Path) -> Path:
    """A folder above the vault's parent."""
    return tmp_path / "above"


@pytest.fixture
def nested(above: Path, entry: Entry) -> Vault:
    vault = Vault.open(above / "parent" / "vault")
    vault.publish(entry.manifest, entry.files)
    return vault


def as_user(user: int, code: str, *arguments: object, namespace: bool = False) -> str:
    """What a process of ``user``, with no groups but its own, prints when it runs ``code``; errors are in it.

    ``namespace``: in a user namespace of its own, where it is root and nobody else has a number.
    """
    command = [sys.executable, "-c", AS_USER, str(user), "yes" if namespace else "", code, *map(str, arguments)]
    merged = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return merged.stdout


def load_as(user: int, root: Path, entry: Entry, *, namespace: bool = False) -> str:
    return as_user(user, LOAD, root, entry.key, namespace=namespace)


def give_to(user: int, folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user, follow_symlinks=False)


class TestModes:
    @pytest.mark.parametrize("levels_up", [1, 2])
    @pytest.mark.parametrize(("mode", "who"), [(0o777, "others"), (0o757, "others"), (0o775, "its group")])
    def test_a_folder_above_that_others_may_write(
        self, nested: Vault, entry: Entry, levels_up: int, mode: int, who: str
    ) -> None:
        place = [nested.root, *nested.root.parents][levels_up]
        place.chmod(mode)
        with pytest.raises(UnsafeVaultError, match=f"above {nested.root}, can be written by {who}") as caught:
            nested.lookup(entry.key)
        assert caught.value.path == place
        assert os.system(str(caught.value).rsplit(": ", 1)[1]) == 0
        assert nested.lookup(entry.key) == entry.manifest

    @pytest.mark.parametrize("mode", [0o1777, 0o1775, 0o1757])
    def test_the_sticky_bit_makes_a_folder_above_safe(
        self, nested: Vault, entry: Entry, above: Path, mode: int
    ) -> None:
        above.chmod(mode)
        assert nested.lookup(entry.key) == entry.manifest

    def test_the_sticky_bit_excuses_nothing_inside_the_vault(self, nested: Vault, entry: Entry) -> None:
        nested.root.chmod(0o1777)
        with pytest.raises(UnsafeVaultError, match="written by others"):
            nested.lookup(entry.key)
        nested.root.chmod(0o755)
        artifact = nested.verified_path(entry.manifest.artifacts[0])
        artifact.parent.chmod(0o1777)
        with pytest.raises(UnsafeVaultError, match="written by others"):
            nested.verified_path(entry.manifest.artifacts[0])

    def test_group_write_is_allowed_above_where_it_is_allowed_in_the_vault(
        self, nested: Vault, entry: Entry, above: Path
    ) -> None:
        trusting = Vault.open(nested.root, trust=Trust(allow_group_write=True))
        above.chmod(0o775)
        assert trusting.lookup(entry.key) == entry.manifest
        above.chmod(0o777)
        with pytest.raises(UnsafeVaultError, match=f"chmod o-w {above}"):
            trusting.lookup(entry.key)

    def test_an_unsafe_folder_above_is_met_before_anything_is_frozen(self, nested: Vault, above: Path) -> None:
        above.chmod(0o777)
        with pytest.raises(UnsafeVaultError):
            check_root(nested.root)

    def test_a_folder_above_is_noticed_once_it_becomes_unsafe(self, nested: Vault, entry: Entry, above: Path) -> None:
        assert nested.lookup(entry.key) is not None
        above.chmod(0o777)
        with pytest.raises(UnsafeVaultError):
            nested.lookup(entry.key)

    def test_a_link_in_an_unsafe_folder_counts_as_what_it_leads_to(
        self, nested: Vault, entry: Entry, tmp_path: Path
    ) -> None:
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o777)
        (tmp_path / "open" / "link").symlink_to(nested.root)
        assert Vault.open(tmp_path / "open" / "link").lookup(entry.key) == entry.manifest
        check_root(tmp_path / "open" / "link")
        nested.root.parent.chmod(0o777)
        with pytest.raises(UnsafeVaultError):
            check_root(tmp_path / "open" / "link")

    def test_a_list_of_users_who_may_write_shows_as_group_write(self, nested: Vault, entry: Entry, above: Path) -> None:
        entries = [(0x01, 7, -1), (0x02, 7, NOBODY), (0x04, 5, -1), (0x10, 7, -1), (0x20, 5, -1)]
        packed = b"".join(struct.pack("<HHI", tag, rights, user & 0xFFFFFFFF) for tag, rights, user in entries)
        try:
            os.setxattr(above, "system.posix_acl_access", struct.pack("<I", 2) + packed)
        except (AttributeError, OSError) as error:
            pytest.skip(f"no POSIX access control lists here: {error}")
        with pytest.raises(UnsafeVaultError, match="written by its group"):
            nested.lookup(entry.key)


class TestCost:
    @pytest.fixture
    def looked_at(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        seen: list[str] = []

        def watch(name: str) -> None:
            real = getattr(os, name)

            def look(path: Any, **options: Any) -> os.stat_result:
                seen.append(str(path))
                found: os.stat_result = real(path, **options)
                return found

            monkeypatch.setattr(os, name, look)

        watch("stat")
        watch("lstat")
        return seen

    def test_an_artifact_costs_no_look_above_the_vault(self, nested: Vault, entry: Entry, looked_at: list[str]) -> None:
        path = nested.layout.artifact_file(entry.manifest.artifacts[0].digest)
        check_ownership(path, root=nested.root)
        assert set(looked_at) <= {str(place) for place in (path, *path.parents)} - {
            str(place) for place in nested.root.parents
        }
        assert len(looked_at) <= 5

    def test_each_folder_above_is_looked_at_at_most_twice(self, nested: Vault, looked_at: list[str]) -> None:
        check_root(nested.root)
        above = [str(place) for place in nested.root.parents]
        assert all(1 <= looked_at.count(place) <= 2 for place in above)  # once to follow links, once for its mode
        assert len(looked_at) <= 2 * len(above) + 2


class TestLoneFiles:
    def test_a_file_and_all_above_are_this_users(self, tmp_path: Path) -> None:
        (tmp_path / "key").write_text("x")
        with open_owned(tmp_path / "key") as file:
            assert file.read() == b"x"

    def test_a_file_that_its_group_may_write(self, tmp_path: Path) -> None:
        (tmp_path / "key").write_text("x")
        (tmp_path / "key").chmod(0o664)
        with pytest.raises(UnsafeVaultError, match="its group"):
            open_owned(tmp_path / "key")

    def test_a_file_in_a_folder_that_others_may_write(self, above: Path) -> None:
        above.mkdir()
        above.chmod(0o777)
        (above / "key").write_text("x")
        with pytest.raises(UnsafeVaultError, match="above"):
            open_owned(above / "key")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="not a regular file"):
            open_owned(tmp_path)


class TestOwners:
    @pytest.mark.root
    @pytest.mark.parametrize("mode", [0o755, 0o1777])
    def test_a_folder_above_of_another_user(self, nested: Vault, entry: Entry, above: Path, mode: int) -> None:
        os.chown(above, SOMEBODY, -1)
        above.chmod(mode)
        with pytest.raises(UnsafeVaultError, match=f"belongs to user {SOMEBODY}, neither.*chown root {above}"):
            nested.lookup(entry.key)

    @pytest.mark.root
    def test_the_root_folder_of_another_user_has_advice_for_containers(
        self, nested: Vault, entry: Entry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, slash = os.lstat, os.lstat("/")
        theirs = os.stat_result((*slash[:4], NOBODY, *slash[5:]))
        monkeypatch.setattr(os, "lstat", lambda path, **options: theirs if str(path) == "/" else real(path, **options))
        with pytest.raises(UnsafeVaultError) as caught:
            nested.lookup(entry.key)
        message = str(caught.value)
        assert message.startswith(f"/, above {nested.root}, belongs to user {NOBODY}, which may stand for an owner")
        assert "chown root / where the container's image is built" in message

    def test_the_overflow_id_where_there_is_no_proc(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(ownership, "_OVERFLOW_ID_FILE", tmp_path / "none")
        assert ownership._overflow_id() == 65534


@pytest.mark.root
class TestOtherUsers:
    """A child process of another user, in a real folder."""

    @pytest.fixture
    def vault(self, open_folder: Path, entry: Entry) -> Vault:
        vault = Vault.open(open_folder / "vault")
        vault.publish(entry.manifest, entry.files)
        return vault

    def test_everyone_loads_from_a_vault_of_root(self, vault: Vault, entry: Entry) -> None:
        assert load_as(NOBODY, vault.root, entry) == "loaded True\n"

    def test_a_user_loads_from_a_vault_of_its_own(self, vault: Vault, entry: Entry) -> None:
        give_to(NOBODY, vault.root)
        assert load_as(NOBODY, vault.root, entry) == "loaded True\n"

    def test_a_user_does_not_load_from_a_vault_of_another(self, vault: Vault, entry: Entry) -> None:
        give_to(SOMEBODY, vault.root)
        printed = load_as(NOBODY, vault.root, entry)
        assert printed.startswith(f"UnsafeVaultError {vault.root} belongs to user {SOMEBODY}")

    def test_not_even_if_only_a_folder_above_is_anothers(self, open_folder: Path, vault: Vault, entry: Entry) -> None:
        give_to(NOBODY, vault.root)
        os.chown(open_folder, SOMEBODY, SOMEBODY)
        printed = load_as(NOBODY, vault.root, entry)
        assert printed.startswith(f"UnsafeVaultError {open_folder}, above {vault.root}, belongs to user {SOMEBODY}")

    @pytest.mark.parametrize(("mode", "replaced"), [(0o777, True), (0o1777, False)])
    def test_what_the_rule_of_the_sticky_bit_rests_on(
        self, open_folder: Path, vault: Vault, entry: Entry, mode: int, replaced: bool
    ) -> None:
        open_folder.chmod(mode)
        as_user(NOBODY, "os.rename(*arguments)", vault.root, open_folder / "moved")
        assert (open_folder / "moved").exists() is replaced
        if not replaced:
            assert load_as(SOMEBODY, vault.root, entry) == "loaded True\n"

    def test_a_hard_link_elsewhere_gives_nobody_a_way_to_write(
        self, open_folder: Path, vault: Vault, entry: Entry
    ) -> None:
        theirs = open_folder / "theirs"
        theirs.mkdir()
        os.chown(theirs, NOBODY, NOBODY)
        artifact = vault.verified_path(entry.manifest.artifacts[0])
        os.link(artifact, theirs / "link")
        printed = as_user(NOBODY, "open(arguments[0], 'r+b')", theirs / "link")
        assert "PermissionError" in printed
        assert vault.verified_path(entry.manifest.artifacts[0]) == artifact

    def test_a_hard_link_to_a_file_of_another_user_is_refused_as_theirs(
        self, open_folder: Path, vault: Vault, entry: Entry
    ) -> None:
        artifact = vault.verified_path(entry.manifest.artifacts[0])
        (open_folder / "theirs").write_bytes(artifact.read_bytes())
        os.chown(open_folder / "theirs", NOBODY, NOBODY)
        artifact.unlink()
        os.link(open_folder / "theirs", artifact)
        with pytest.raises(UnsafeVaultError, match=f"belongs to user {NOBODY}"):
            vault.verified_path(entry.manifest.artifacts[0])

    def test_a_user_namespace_that_does_not_know_the_owner_says_so(self, vault: Vault, entry: Entry) -> None:
        printed = load_as(NOBODY, vault.root, entry, namespace=True)
        if printed.startswith("no user namespaces"):
            pytest.skip(printed.strip())
        assert printed.startswith("UnsafeVaultError ")
        assert "may stand for an owner that this container or file server does not map" in printed

    @pytest.mark.parametrize("safe", [True, False])
    def test_a_bind_mount_counts_where_it_is_mounted(
        self, open_folder: Path, entry: Entry, tmp_path: Path, safe: bool
    ) -> None:
        source, place = open_folder / "source", open_folder / "place"
        for folder in (source, place / "vault"):
            folder.mkdir(parents=True)
        made = Vault.open(source / "vault")
        made.publish(entry.manifest, entry.files)
        (source if safe else place).chmod(0o777)
        mount = f"""
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 4096, 16384, 1 << 18
libc = ctypes.CDLL(None, use_errno=True)
source, place = (os.fsencode(path) for path in arguments[2:])
if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) or libc.mount(
    source, place, None, MS_BIND, None
):
    sys.exit(f"no mounts: {{os.strerror(ctypes.get_errno())}}")
{LOAD}"""
        printed = as_user(0, mount, place / "vault", entry.key, made.root, place / "vault")
        if printed.startswith("no mounts"):
            pytest.skip(printed.strip())
        assert printed.startswith("loaded True" if safe else f"UnsafeVaultError {place}, above")


def test_folders_that_the_store_makes_are_safe_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        vault = Vault.open(tmp_path / "one" / "two" / "vault")
        entry = make_entry(tmp_path / "source", "a", {"unet/0.pt2": b"graph"})
        vault.publish(entry.manifest, entry.files)
    finally:
        os.umask(before)
    assert vault.lookup(entry.key) == entry.manifest
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o755
