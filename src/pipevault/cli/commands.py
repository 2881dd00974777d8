"""The commands that look at a vault: ls, show and where."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from pipevault.cli import render
from pipevault.cli.listing import Row, read_rows
from pipevault.cli.options import command, open_vault, vault_options
from pipevault.errors import SettingsError
from pipevault.settings import Settings, config_file
from pipevault.store.manifest import Manifest
from pipevault.store.retention.pins import read_pins
from pipevault.store.retention.usage import last_use_s
from pipevault.store.trust.signature import signature_states
from pipevault.store.trust.signing_keys import load_trusted

FILTERS = ("kind", "model", "dtype", "torch", "device", "pin")
_NEWEST_FIRST: Mapping[str, Callable[[Row], Any]] = {
    "frozen": lambda row: row.created_at,
    "used": lambda row: row.used_at,
    "size": lambda row: row.size_bytes,
}
_DIGEST = re.compile("[0-9a-f]{64}")


def _filter(_: click.Context, __: click.Parameter, texts: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in FILTERS:
            if equals and (near := get_close_matches(name, FILTERS, n=1)):
                raise SettingsError(f"Unknown filter {name!r}. Did you mean {near[0]}={value}?")
            raise SettingsError(f"Invalid filter {text!r}: expected NAME=VALUE with NAME one of {', '.join(FILTERS)}.")
        pairs.append((name, value))
    return pairs


@command("ls", short_help="List the entries of the vault.")
@click.option(
    "--kind", type=click.Choice(["plan", "graph", "all"]), default="all", show_default=True, help="Which entries."
)
@click.option(
    "--sort",
    type=click.Choice([*_NEWEST_FIRST, "model", "torch", "device", "pin"]),
    default="frozen",
    show_default=True,
    help="Newest, largest first.",
)
@click.option(
    "--filter",
    "filters",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_filter,
    help=f"Only entries that have VALUE; NAME is {', '.join(FILTERS[:-1])} or {FILTERS[-1]}. Any number of times.",
)
@vault_options
def list_entries(kind: str, sort: str, filters: list[tuple[str, str]], dir: Path | None, as_json: bool) -> None:
    """List the entries of the vault: graphs, and plans that say which graphs a pipeline needs for a call.

    MODEL is the class of the pipeline or of the graph's part, USED the time since its last use. `pipevault show KEY`
    shows all of an entry.

    \b
    Examples:
      pipevault ls
      pipevault ls --kind plan --sort used
      pipevault ls --filter model=UNet2DConditionModel --filter device=cuda
      pipevault ls --dir /srv/vault --json
    """
    vault = open_vault(dir)
    entries = {one.key.digest: one for one in vault.manifests() if isinstance(one, Manifest)} if as_json else {}
    rows, broken = read_rows(vault)
    wanted = filters if kind == "all" else [*filters, ("kind", kind)]
    rows = [row for row in rows if all(row.fits(name, value) for name, value in wanted)]
    rows.sort(key=_NEWEST_FIRST.get(sort, lambda row: row.text(sort)), reverse=sort in _NEWEST_FIRST)
    if as_json:
        render.print_json(
            {
                "vault": vault.root,
                "entries": [
                    {**_entry_document(entry), "last_used_at": row.used_at or None, "pins": row.pins}
                    for row in rows
                    if (entry := entries.get(row.key))
                ],
                "broken": [{"key": one.key, "path": one.path, "reason": one.reason} for one in broken],
            }
        )
    else:
        if rows:
            columns = ("KEY", "MODEL", "CALL", "TORCH", "DEVICE", "SIZE", "USED", "PIN")
            cells = [row.shown() for row in rows]
            render.show_rows(columns, cells, right=("SIZE",), elastic=("MODEL", "CALL", "DEVICE", "PIN"))
        total_bytes = sum({digits: size for row in rows for digits, size in row.artifacts.items()}.values())
        number = render.count_text(len(rows), "entry", "entries")
        render.note(f"{number}, {render.size_text(total_bytes)} in {vault.root}")
        for one in broken:
            render.note(f"{one.key.short} cannot be used: {one.reason}")
    if broken:
        number = render.count_text(len(broken), "entry is", "entries are")
        render.note(f"{number} damaged, or of a later pipevault: `pipevault doctor` says what to do.")


@command("show", short_help="Show one entry.")
@click.argument("key", metavar="KEY")
@vault_options
def show(key: str, dir: Path | None, as_json: bool) -> None:
    """Show the entry whose key begins with KEY: its factors, its parts, its artifacts and what it needs.

    \b
    Examples:
      pipevault show 3f9a2c
      pipevault show 3f9a2c --json
    """
    vault = open_vault(dir)
    manifest = vault.find(key)
    digest, file = manifest.key.digest, vault.layout.manifest_file(manifest.key.digest)
    signatures = signature_states(vault.layout, manifest, load_trusted(Settings.resolve(dir=dir).trusted_keys))
    if as_json:
        render.print_json(
            {
                **_entry_document(manifest),
                "manifest": file,
                "artifacts": [
                    {"name": ref.name, "digest": ref.digest, "size_bytes": ref.size_bytes} for ref in manifest.artifacts
                ],
                "signatures": [
                    {"public_key": one.public_key_id, "state": one.state, "reason": one.reason, "path": one.path}
                    for one in signatures
                ],
                "info": manifest.info,
            }
        )
        return
    used_at = render.time_text(last_use_s(vault.layout, digest))
    worth = {"good": "good, by a trusted key", "unknown key": "by a key that is not in trusted_keys"}
    signed = [f"{one.public_key_id} {worth.get(one.state, f'bad: {one.reason}')}" for one in signatures]
    facts = [
        ("key", digest.hex),
        ("kind", manifest.key.kind),
        ("shelf", manifest.key.shelf.hex),
        ("frozen", f"{manifest.created_at} ({render.age_text(manifest.created_at)})"),
        ("used", f"{used_at} ({render.age_text(used_at)})" if used_at else "never"),
        ("pins", ", ".join(pin.name for pin in read_pins(vault.layout) if pin.key == digest) or "none"),
        ("size", render.size_text(manifest.size_bytes)),
        ("manifest", str(file)),
        ("signatures", "; ".join(signed) or "none"),
    ]
    parts = [(name, _part_text(part)) for name, part in manifest.parts.items()]
    artifacts = [(ref.digest.short, render.size_text(ref.size_bytes), ref.name) for ref in manifest.artifacts]
    needs = [
        (key.short, "in the vault" if vault.layout.manifest_file(key).exists() else "not in the vault")
        for key in manifest.needs
    ]
    render.show(
        render.facts(facts),
        render.table(("PART", "STATE"), parts),
        render.table(("KEY", "NEEDED, AND WHERE"), needs),
        render.table(("SHA-256", "SIZE", "ARTIFACT"), artifacts, right=("SIZE",)),
        render.table(("FACTOR", "VALUE"), _leaf_rows(manifest.key.factors)),
        render.table(("FACT", "VALUE"), _leaf_rows(manifest.info)),
    )


def _leaf_rows(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    texts = [(name, render.value_text(value)) for name, value in render.flat(mapping) if name]
    return [(name, text[:12] if _DIGEST.fullmatch(text) else text) for name, text in texts]


@command("where", short_help="Print the vault's folder.")
@vault_options
def where(dir: Path | None, as_json: bool) -> None:
    """Print the vault's folder, and to standard error how much it may hold; with --json all settings in force.

    \b
    Examples:
      pipevault where
      du -sh "$(pipevault where)"
    """
    settings = Settings.resolve(dir=dir)
    if as_json:
        file = config_file()
        render.print_json({**settings.to_json(), "config_file": str(file) if file else None})
        return
    render.say(str(settings.dir))
    limit = "no limit" if settings.max_size is None else render.size_text(settings.max_size)
    render.note(f"max_size: {limit}")


def _entry_document(manifest: Manifest) -> dict[str, Any]:
    return {
        "key": manifest.key.digest,
        "kind": manifest.key.kind,
        "shelf": manifest.key.shelf,
        "needs": manifest.needs,
        "created_at": manifest.created_at,
        "size_bytes": manifest.size_bytes,
        "factors": manifest.key.factors,
        "parts": manifest.parts,
    }


def _part_text(part: Any) -> str:
    """Return ``frozen, 2 graphs for 19 FluxTransformerBlock`` or ``eager: reason``; another form stands as it is."""
    if not isinstance(part, Mapping) or "status" not in part:
        return render.value_text(part)
    graphs = part.get("graphs")
    number = graphs if isinstance(graphs, int) else len(graphs) if graphs else 0
    regions = f" for {part['regions']}" if part.get("regions") else ""
    counted = f", {render.count_text(number, 'graph', 'graphs')}{regions}" if number else ""
    reason = f": {part['reason']}" if part.get("reason") else ""
    return f"{part['status']}{counted}{reason}"
