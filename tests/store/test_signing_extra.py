"""Without the package cryptography: a vault without signatures works, and whoever needs one is told what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.store_entries import Entry
from pipevault.errors import MissingExtraError, SignatureError
from pipevault.settings import Settings
from pipevault.store.check import verify
from pipevault.store.tiers import Tiers
from pipevault.store.trust.signature import check_signature
from pipevault.store.trust.signing_keys import PublicKey, load_trusted, read_private_key, write_key_pair
from pipevault.store.vault import Vault

INSTALL = r"pip install 'pipevault\[signing\]'"


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every import of the package fail, as where it is not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)


@pytest.fixture
def public(vault: Vault, entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PublicKey:
    """The key by which the published entry is signed; then the package is hidden."""
    public = write_key_pair(tmp_path / "key")
    vault.sign(vault.publish(entry.manifest, entry.files), read_private_key(tmp_path / "key"))
    hide(monkeypatch)
    return public


def test_a_vault_without_signatures_does_without(
    vault: Vault, entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch)
    vault.publish(entry.manifest, entry.files)
    found = Tiers(Settings(vault.root)).lookup(entry.key)
    assert found is not None
    assert verify(vault).sound


def test_nothing_imports_it_beforehand() -> None:
    modules = "pipevault.cli.app, pipevault.store.tiers, pipevault.store.check"
    code = f"import sys, {modules}\nassert 'cryptography' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_key_is_neither_made_nor_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch)
    with pytest.raises(MissingExtraError, match=INSTALL) as caught:
        write_key_pair(tmp_path / "key")
    assert caught.value.extra == "signing"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MissingExtraError, match=INSTALL):
        read_private_key(tmp_path / "key")


def test_public_keys_are_read_all_the_same(public: PublicKey) -> None:
    assert load_trusted([public.text]) == (public,)


def test_a_required_signature_that_cannot_be_checked_is_an_error(vault: Vault, entry: Entry, public: PublicKey) -> None:
    with pytest.raises(MissingExtraError, match=INSTALL):
        check_signature(vault.layout, entry.manifest, policy="require", trusted=[public])
    settings = Settings(vault.root, signature="require", trusted_keys=(public.text,))
    with pytest.raises(MissingExtraError, match=INSTALL):
        Tiers(settings).lookup(entry.key)


def test_a_wanted_signature_that_cannot_be_checked_is_a_warning(vault: Vault, entry: Entry, public: PublicKey) -> None:
    warning = check_signature(vault.layout, entry.manifest, policy="warn", trusted=[public])
    assert warning is not None
    assert "pipevault[signing]" in warning


def test_an_entry_that_counts_for_its_signature_alone_is_an_error(
    vault: Vault, entry: Entry, public: PublicKey
) -> None:
    vault.layout.manifest_file(entry.key).chmod(0o666)
    with pytest.raises(MissingExtraError, match=INSTALL):
        Tiers(Settings(vault.root, trusted_keys=(public.text,))).lookup(entry.key)


def test_an_entry_without_a_signature_is_refused_for_that(
    vault: Vault, entry: Entry, public: PublicKey, tmp_path: Path
) -> None:
    for path in vault.layout.signatures_dir.rglob("*.json"):
        path.unlink()
    with pytest.raises(SignatureError, match="has no signature"):
        check_signature(vault.layout, entry.manifest, policy="require", trusted=[public])


def test_verify_moves_no_signature_that_it_cannot_check(vault: Vault, public: PublicKey) -> None:
    with pytest.raises(MissingExtraError, match=INSTALL):
        verify(vault, fix=True, trusted=[public])
    assert len(list(vault.layout.signatures_dir.rglob("*.json"))) == 1
