"""What somebody may have put in the place of a vault's files and folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.store_entries import Entry
from pipevault.digest import canonical_json
from pipevault.errors import PinError, UnsafeVaultError, VaultError
from pipevault.store.layout import Layout
from pipevault.store.retention.pins import pins
from pipevault.store.retention.prune import carry_out, plan_prune
from pipevault.store.stats.summary import compact, summary
from pipevault.store.vault import BrokenManifest, Vault


@pytest.mark.parametrize("folder", Layout(Path("/v")).folders, ids=lambda folder: folder.name)
def test_a_folder_that_is_a_link_out_of_the_vault(vault: Vault, tmp_path: Path, folder: Path) -> None:
    place, outside = vault.root / folder.name, tmp_path / "outside"
    outside.mkdir()
    if place.exists():
        place.rename(tmp_path / "aside")
    place.symlink_to(outside)
    with pytest.raises(UnsafeVaultError, match="leads out of the vault"):
        Vault.open(vault.root)


def replace_by_pipe(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def test_a_pipe_in_place_of_a_manifest(vault: Vault, entry: Entry) -> None:
    vault.publish(entry.manifest, entry.files)
    replace_by_pipe(vault.layout.manifest_file(entry.key))
    [found] = vault.manifests()
    assert isinstance(found, BrokenManifest)


def test_a_pipe_in_place_of_a_pin(vault: Vault) -> None:
    replace_by_pipe(vault.layout.pin_file("prod"))
    with pytest.raises((PinError, VaultError)):
        pins(vault.layout)
    vault.unpin("prod")
    assert pins(vault.layout) == {}


EVENTS = "worker.99999.000000000000000000000000.0123456789abcdef.jsonl"


@pytest.mark.parametrize(
    "line", ['{"event":"miss","reason":"\\ud800","time":1}', '{"event":"hit","time":1e15}', '{"event":5,"time":1}']
)
def test_a_line_that_is_no_event(vault: Vault, line: str) -> None:
    vault.layout.events_dir.mkdir(exist_ok=True)
    (vault.layout.events_dir / EVENTS).write_text(line + "\n")
    assert "1 lines that are not events" in str(summary(vault.layout))
    compact(vault.layout)


@pytest.mark.parametrize(
    "fields",
    [
        {"since": "x"},
        {"since": 1e15},
        {"rows": [["", "hit", "", {"times": "x"}]]},
        {"rows": [["zz", "hit", "", {"times": 1}]]},
        {"rows": [["", "hit", ""]]},
        {"rows": 5},
    ],
)
def test_totals_with_odd_values_are_left_out(vault: Vault, fields: dict[str, object]) -> None:
    vault.layout.events_dir.mkdir(exist_ok=True)
    vault.layout.totals_file.write_bytes(canonical_json({"totals_version": 2, "since": 1, "rows": [], **fields}))
    assert "totals.json" in str(summary(vault.layout))
    compact(vault.layout)


def test_a_folder_in_place_of_totals(vault: Vault) -> None:
    vault.layout.totals_file.mkdir(parents=True)
    assert "totals.json" in str(summary(vault.layout))


def test_a_folder_in_place_of_a_signature_keeps_nothing_from_being_pruned(vault: Vault, entry: Entry) -> None:
    vault.publish(entry.manifest, entry.files)
    vault.layout.signature_file(entry.key, "0" * 16).mkdir(parents=True)
    report = carry_out(vault, plan_prune(vault, max_size=0))
    assert [going.key for going in report.entries] == [entry.key]
    assert any("could not be removed" in problem for problem in report.problems)
