"""Pins: made once, moved on request, removed by name, and never quietly unreadable."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.fault_steps import killed_at_each_step
from helpers.store_entries import Entry, leftovers, make_entry
from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.errors import PinError, PinNameError, UnknownKeyError, UnknownPinError, VaultNotWritableError
from pipevault.store.layout import Layout
from pipevault.store.places import iter_foreign
from pipevault.store.retention import pins as pins_module
from pipevault.store.retention.pins import pins
from pipevault.store.vault import Vault


@pytest.fixture
def pair(vault: Vault, tmp_path: Path) -> tuple[Entry, Entry]:
    first = make_entry(tmp_path / "source", "a", {"unet/0.pt2": b"a"})
    second = make_entry(tmp_path / "source", "b", {"unet/0.pt2": b"b"})
    for entry in (first, second):
        vault.publish(entry.manifest, entry.files)
    return first, second


def test_a_pin_is_canonical_json_and_part_of_the_layout(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    vault.pin(pair[0].key, "prod")
    data = vault.layout.pin_file("prod").read_bytes()
    document = json.loads(data)
    assert canonical_json(document) == data
    assert document.keys() == {"created_at", "key", "pin_version"}
    assert pins(vault.layout) == {"prod": pair[0].key}
    assert list(iter_foreign(vault.layout)) == []
    assert leftovers(vault) == []


def test_pinning_the_same_entry_again_changes_nothing(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    vault.pin(pair[0].key, "prod")
    before = vault.layout.pin_file("prod").read_bytes()
    assert vault.pin(pair[0].key, "prod") is None
    assert vault.layout.pin_file("prod").read_bytes() == before


def test_two_pins_of_one_name(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    first, second = pair
    vault.pin(first.key, "prod")
    with pytest.raises(PinError, match="--move") as raised:
        vault.pin(second.key, "prod")
    assert raised.value.name == "prod"
    assert pins(vault.layout) == {"prod": first.key}


def test_a_pin_is_moved_on_request(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    first, second = pair
    assert vault.pin(first.key, "prod", move=True) is None
    assert vault.pin(second.key, "prod", move=True) == first.key
    assert pins(vault.layout) == {"prod": second.key}


def test_of_two_that_race_for_a_name_one_gets_it(
    vault: Vault, pair: tuple[Entry, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pair
    vault.pin(first.key, "prod")
    read, looks = pins_module.read_pin, iter([None])

    def too_early(layout: Layout, name: str) -> Digest | None:
        return next(looks, read(layout, name))

    monkeypatch.setattr(pins_module, "read_pin", too_early)
    with pytest.raises(PinError, match="already"):
        vault.pin(second.key, "prod")
    assert pins(vault.layout) == {"prod": first.key}


def test_where_links_are_not_possible_a_taken_name_is_noticed_all_the_same(
    vault: Vault, pair: tuple[Entry, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    vault.pin(pair[0].key, "prod")
    with pytest.raises(PinError):
        vault.pin(pair[1].key, "prod")
    assert pins(vault.layout) == {"prod": pair[0].key}


def test_an_absent_entry_cannot_be_pinned(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    with pytest.raises(UnknownKeyError):
        vault.pin(digest_bytes(b"absent"), "prod")
    assert pins(vault.layout) == {}


def test_an_entry_that_is_removed_while_it_is_pinned(
    vault: Vault, pair: tuple[Entry, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = pins_module.create_file  # type: ignore[attr-defined]

    def remove_first(path: Path, data: bytes, *, staging: Path) -> None:
        vault.layout.manifest_file(pair[0].key).unlink()
        create(path, data, staging=staging)

    monkeypatch.setattr(pins_module, "create_file", remove_first)
    with pytest.raises(UnknownKeyError):
        vault.pin(pair[0].key, "prod")
    assert pins(vault.layout) == {}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../prod", "-x", "a b", "x" * 65, "prod\n", "é"])
def test_a_name_that_is_none(vault: Vault, pair: tuple[Entry, Entry], name: str) -> None:
    with pytest.raises(PinNameError, match="Invalid name of a pin"):
        vault.pin(pair[0].key, name)
    with pytest.raises(PinNameError, match="Invalid name of a pin"):
        vault.unpin(name)


def test_unpin(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    vault.pin(pair[0].key, "prod")
    assert vault.unpin("prod") == pair[0].key
    assert pins(vault.layout) == {}


def test_unpin_what_is_no_pin_names_those_that_are(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    with pytest.raises(UnknownPinError, match="There are none"):
        vault.unpin("prod")
    vault.pin(pair[0].key, "staging")
    with pytest.raises(UnknownPinError, match="Pins: staging"):
        vault.unpin("prod")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"no JSON",
        b'{"created_at":"x","key":"short","pin_version":1}',
        b'{"key":"' + b"a" * 64 + b'","pin_version":1}',
        b'{"created_at":"x", "key":"' + b"a" * 64 + b'","pin_version":1}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_damaged_pin_is_an_error_until_it_is_unpinned(
    vault: Vault, pair: tuple[Entry, Entry], content: bytes
) -> None:
    vault.pin(pair[0].key, "prod")
    vault.layout.pin_file("prod").write_bytes(content)
    with pytest.raises(PinError, match="pipevault unpin prod"):
        pins(vault.layout)
    assert vault.unpin("prod") is None
    assert pins(vault.layout) == {}


def test_a_pin_of_a_later_version(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    vault.pin(pair[0].key, "prod")
    vault.layout.pin_file("prod").write_bytes(b'{"pin_version":2}')
    with pytest.raises(PinError, match="Upgrade"):
        pins(vault.layout)


def test_a_read_only_vault(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    read_only = replace(vault, writable=False)
    with pytest.raises(VaultNotWritableError):
        read_only.pin(pair[0].key, "prod")
    with pytest.raises(VaultNotWritableError):
        read_only.unpin("prod")
    assert pins(read_only.layout) == {}


@pytest.mark.parametrize("move", [False, True])
def test_killed_while_pinning(vault: Vault, pair: tuple[Entry, Entry], move: bool) -> None:
    first, second = pair
    if move:
        vault.pin(first.key, "prod")
    outcomes = []
    for _ in killed_at_each_step(lambda: vault.pin(second.key, "prod", move=move)):
        outcomes.append(pins(vault.layout).get("prod") == second.key)
        assert pins(vault.layout) in ({}, {"prod": first.key}, {"prod": second.key})
        assert list(iter_foreign(vault.layout)) == []
        if move:
            vault.pin(first.key, "prod", move=True)
        else:
            vault.layout.pin_file("prod").unlink(missing_ok=True)
    assert outcomes[-1]
    assert not outcomes[0]
