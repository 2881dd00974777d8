"""The commands for a vault: ls, show, rm and where."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipevault.cli import render
from pipevault.cli.options import dir_option, json_option
from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, NewerVaultError, NotAVaultError, SettingsError
from pipevault.settings import Settings, config_file

if TYPE_CHECKING:
    from pipevault.store.manifest import Manifest
    from pipevault.store.removal import RemovalPlan
    from pipevault.store.vault import BrokenManifest, Vault


@click.command("ls", short_help="List the entries of the vault.")
@dir_option
@json_option
def list_entries(dir: Path | None, as_json: bool) -> None:
    """List the entries of the vault.

    \b
    Examples:
      pipevault ls
      pipevault ls --dir /srv/vault --json
    """
    root, whole, broken = _entries(dir)
    if as_json:
        render.print_json(
            {
                "vault": str(root),
                "entries": [_entry_document(entry) for entry in whole],
                "broken": [_broken_document(entry) for entry in broken],
            }
        )
        return
    if whole:
        columns = ("KEY", "PIPELINE", "CALL", "DTYPE", "PARTS", "SIZE", "FROZEN")
        rows = [_entry_row(entry) for entry in sorted(whole, key=lambda entry: entry.created_at, reverse=True)]
        render.console().print(render.table(columns, rows, right=("SIZE",)))
    total_bytes = sum({ref.digest: ref.size_bytes for entry in whole for ref in entry.artifacts}.values())
    render.note(f"{_count(len(whole), 'entry', 'entries')}, {render.size_text(total_bytes)} in {root}")
    for entry in broken:
        render.note(f"{entry.key.short} cannot be used: {entry.reason}")


@click.command("show", short_help="Show one entry.")
@click.argument("key", metavar="KEY")
@dir_option
@json_option
def show(key: str, dir: Path | None, as_json: bool) -> None:
    """Show the entry whose key begins with KEY: its factors, its parts and its artifacts.

    \b
    Examples:
      pipevault show 3f9a2c
      pipevault show 3f9a2c --json
    """
    vault = _open_vault(dir)
    manifest = vault.find(key)
    if as_json:
        render.print_json(
            {
                **_entry_document(manifest),
                "manifest": str(vault.layout.manifest_file(manifest.key.digest)),
                "artifacts": [
                    {"name": ref.name, "digest": ref.digest.hex, "size_bytes": ref.size_bytes}
                    for ref in manifest.artifacts
                ],
                "info": dict(manifest.info),
            }
        )
        return
    console = render.console()
    facts = [
        ("key", manifest.key.digest.hex),
        ("frozen", f"{manifest.created_at} ({render.age_text(manifest.created_at)})"),
        ("size", render.size_text(manifest.size_bytes)),
        ("manifest", str(vault.layout.manifest_file(manifest.key.digest))),
        *((name, render.value_text(value)) for name, value in render.flat(manifest.info) if name),
    ]
    parts = [(name, _part_text(part)) for name, part in manifest.parts.items()]
    artifacts = [(ref.name, render.size_text(ref.size_bytes), ref.digest.hex) for ref in manifest.artifacts]
    factors = [(name, render.value_text(value)) for name, value in render.flat(manifest.key.factors)]
    for block in (
        render.facts(facts),
        render.table(("PART", "STATE"), parts),
        render.table(("ARTIFACT", "SIZE", "SHA-256"), artifacts, right=("SIZE",)),
        render.table(("FACTOR", "VALUE"), factors),
    ):
        console.print(block)
        console.print()


@click.command("rm", short_help="Remove entries.")
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@dir_option
@json_option
def remove(keys: tuple[str, ...], dry_run: bool, yes: bool, dir: Path | None, as_json: bool) -> None:
    """Remove the entries whose keys begin with KEY, and the artifacts that no other entry uses.

    \b
    Examples:
      pipevault rm 3f9a2c --dry-run
      pipevault rm 3f9a2c 77b01e --yes
    """
    vault = _open_vault(dir)
    plan = vault.plan_removal(sorted({_find_key(vault, key) for key in keys}))
    if dry_run:
        _report_removal(plan.keys, plan.artifacts, plan.shared, plan.size_bytes, dry_run=True, as_json=as_json)
        return
    if not yes:
        _confirm_removal(plan)
    report = vault.remove(plan)
    _report_removal(report.keys, report.artifacts, report.shared, report.freed_bytes, dry_run=False, as_json=as_json)


@click.command("where", short_help="Print the vault's folder.")
@dir_option
@json_option
def where(dir: Path | None, as_json: bool) -> None:
    """Print the vault's folder; with --json all settings in force.

    \b
    Examples:
      pipevault where
      du -sh "$(pipevault where)"
    """
    settings = Settings.resolve(dir=dir)
    if as_json:
        render.print_json({**asdict(settings), "dir": str(settings.dir), "config_file": str(config_file())})
        return
    click.echo(settings.dir)


def _open_vault(dir: Path | None) -> Vault:
    from pipevault.store.vault import Vault

    return Vault.open(Settings.resolve(dir=dir).dir, create=False)


def _entries(dir: Path | None) -> tuple[Path, list[Manifest], list[BrokenManifest]]:
    """The vault's folder and its entries, whole and broken; none where the folder is absent or empty."""
    from pipevault.store.manifest import Manifest
    from pipevault.store.vault import BrokenManifest, Vault

    root = Settings.resolve(dir=dir).dir
    try:
        vault = Vault.open(root, create=False)
    except NotAVaultError:
        if root.exists() and not (root.is_dir() and not any(root.iterdir())):
            raise
        return root, [], []
    entries = list(vault.manifests())
    whole = [entry for entry in entries if isinstance(entry, Manifest)]
    return vault.root, whole, [entry for entry in entries if isinstance(entry, BrokenManifest)]


def _find_key(vault: Vault, prefix: str) -> Digest:
    try:
        return vault.find(prefix).key.digest
    except (CorruptEntryError, NewerVaultError) as error:
        # A manifest that cannot be read can be removed all the same.
        if key := vault.layout.key_of_manifest(error.path):
            return key
        raise


def _confirm_removal(plan: RemovalPlan) -> None:
    if not _is_interactive():
        raise SettingsError("rm asks before it removes, and standard input is no terminal: give --yes or --dry-run.")
    question = f"Remove {_count(len(plan.keys), 'entry', 'entries')} ({render.size_text(plan.size_bytes)})?"
    click.confirm(question, abort=True, err=True)


def _is_interactive() -> bool:
    return sys.stdin.isatty()


def _report_removal(
    keys: tuple[Digest, ...],
    artifacts: tuple[Digest, ...],
    shared: tuple[Digest, ...],
    size_bytes: int,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    if as_json:
        render.print_json(
            {
                "dry_run": dry_run,
                "keys": [key.hex for key in keys],
                "artifacts": [digest.hex for digest in artifacts],
                "shared": [digest.hex for digest in shared],
                "size_bytes": size_bytes,
            }
        )
        return
    verb = "Would remove" if dry_run else "Removed"
    for key in keys:
        click.echo(f"{verb} {key.hex}")
    files = _count(len(artifacts), "artifact", "artifacts")
    kept = f"; {_count(len(shared), 'artifact stays', 'artifacts stay')} for other entries" if shared else ""
    render.note(f"{verb} {_count(len(keys), 'entry', 'entries')} and {files}, {render.size_text(size_bytes)}{kept}.")


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _entry_document(manifest: Manifest) -> dict[str, Any]:
    return {
        "key": manifest.key.digest.hex,
        "created_at": manifest.created_at,
        "size_bytes": manifest.size_bytes,
        "factors": dict(manifest.key.factors),
        "parts": dict(manifest.parts),
    }


def _broken_document(entry: BrokenManifest) -> dict[str, str]:
    return {"key": entry.key.hex, "path": str(entry.path), "reason": entry.reason}


def _entry_row(manifest: Manifest) -> tuple[str, ...]:
    factors = manifest.key.factors
    return (
        manifest.key.digest.short,
        _pipeline_text(factors.get("pipeline")),
        _call_text(factors.get("call")),
        _dtype_text(factors.get("dtype")),
        ", ".join(name if _is_frozen(part) else f"{name} (eager)" for name, part in _called_parts(manifest)),
        render.size_text(manifest.size_bytes),
        render.age_text(manifest.created_at),
    )


def _pipeline_text(pipeline: Any) -> str:
    return _leaf_texts(pipeline)[0].rpartition(".")[2]


def _dtype_text(dtype: Any) -> str:
    return ", ".join(dict.fromkeys(_leaf_texts(dtype)))


def _call_text(call: Any) -> str:
    """``768x512 x10 guidance`` for a call that names its size; else every factor with its name."""
    if not isinstance(call, Mapping) or not {"height", "width"} <= call.keys():
        return ", ".join(f"{name}={render.value_text(value)}" for name, value in render.flat(call))
    texts = [f"{call['width']}x{call['height']}"]
    if call.get("num_frames"):
        texts.append(f"{call['num_frames']} frames")
    if call.get("batch_size", 1) != 1:
        texts.append(f"batch {call['batch_size']}")
    if call.get("guidance"):
        texts.append("guidance")
    return ", ".join(texts)


def _leaf_texts(value: Any) -> list[str]:
    return [render.value_text(leaf) for _, leaf in render.flat(value)]


def _called_parts(manifest: Manifest) -> list[tuple[str, Any]]:
    return [
        (name, part)
        for name, part in manifest.parts.items()
        if not (isinstance(part, Mapping) and part.get("status") == "not called")
    ]


def _is_frozen(part: Any) -> bool:
    return not isinstance(part, Mapping) or part.get("status", "frozen") == "frozen"


def _part_text(part: Any) -> str:
    """``frozen, 2 graphs`` or ``eager: reason``; what has another form is shown as it stands."""
    if not isinstance(part, Mapping) or "status" not in part:
        return render.value_text(part)
    graphs = part.get("graphs")
    number = graphs if isinstance(graphs, int) else len(graphs) if graphs else 0
    counted = f", {_count(number, 'graph', 'graphs')}" if number else ""
    reason = f": {part['reason']}" if part.get("reason") else ""
    return f"{part['status']}{counted}{reason}"
