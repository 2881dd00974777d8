"""Listing what stands in a vault, and finding a key by its beginning."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.store_entries import Entry
from pipevault.digest import Digest
from pipevault.errors import UnknownKeyError, VaultError
from pipevault.store.places import children, key_in, spread, the_key
from pipevault.store.publish import write_document
from pipevault.store.vault import Vault


class TestTheKey:
    KEYS = tuple(Digest(text * 32) for text in ("aa", "ab", "bb"))

    @pytest.mark.parametrize(("prefix", "index"), [("b", 2), ("aaa", 0), (" AB ", 1), ("ab" * 32, 1)])
    def test_one_begins_with_it(self, prefix: str, index: int) -> None:
        assert the_key(prefix, self.KEYS, "entry") == self.KEYS[index]

    @pytest.mark.parametrize(
        ("prefix", "message"),
        [
            ("", r"'' is not a key"),
            ("x", r"'x' is not a key"),
            ("a" * 65, "is not a key"),
            ("c", r"No entry of /v has a key that begins with c\."),
            ("a", r"2 keys begin with a: aaaaaaaaaaaa, abababababab\. Give more digits\."),
        ],
    )
    def test_none_or_several(self, prefix: str, message: str) -> None:
        with pytest.raises(UnknownKeyError, match=message) as caught:
            the_key(prefix, self.KEYS, "entry of /v")
        assert caught.value.candidates == (tuple(key.hex for key in self.KEYS[:2]) if prefix == "a" else ())

    def test_of_many_ten_are_shown(self) -> None:
        keys = [Digest(f"{number:064x}") for number in range(13)]
        with pytest.raises(UnknownKeyError, match=r"13 keys .* and 3 more") as caught:
            the_key("0", keys, "entry")
        assert len(caught.value.candidates) == 13


def test_only_what_belongs_there_is_spread(vault: Vault, entry: Entry, tmp_path: Path) -> None:
    vault.publish(entry.manifest, entry.files)
    layout = vault.layout
    path = layout.manifest_file(entry.key)
    (path.parent / "notes.txt").write_text("")
    (layout.entries_dir / "notes").mkdir()
    (layout.entries_dir / ("0" * 16)).symlink_to(path.parent)
    (layout.entries_dir / ("f" * 16)).mkdir()
    (layout.entries_dir / ("f" * 16) / path.name).write_bytes(path.read_bytes())
    assert [Path(file.path) for file in spread(layout, layout.entries_dir)] == [path]
    assert key_in(path.name) == entry.key
    assert key_in("notes.json") is key_in(entry.key.hex) is None
    names = [file.name for file in spread(layout, layout.artifacts_dir)]
    assert names == sorted(digest.hex for digest in entry.files)


def test_an_absent_folder_is_empty_and_a_file_is_an_error(vault: Vault) -> None:
    assert children(vault.layout.pins_dir) == spread(vault.layout, vault.layout.uses_dir) == []
    vault.layout.pins_dir.write_text("")
    with pytest.raises(VaultError, match="could not be listed"):
        children(vault.layout.pins_dir)


def test_a_document_is_written_in_one_step_and_leaves_no_staging(vault: Vault) -> None:
    path = vault.layout.pin_file("prod")
    for data in (b"old", b"new"):
        write_document(vault.layout, path, data)
        assert path.read_bytes() == data
    assert children(vault.layout.tmp_dir) == []
    assert children(vault.layout.pins_dir) == [path]
