"""The commands that look at a vault: ls, show and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipevault.cli import render
from pipevault.cli.keys import entry_signatures, signatures_document, signatures_text
from pipevault.cli.options import dir_option, json_option
from pipevault.cli.vaults import list_rows, open_vault, read_entries
from pipevault.settings import Settings, config_file

if TYPE_CHECKING:
    from pipevault.store.manifest import Manifest
    from pipevault.store.vault import BrokenManifest


@click.command("ls", short_help="List the entries of the vault.")
@click.option(
    "--kind", type=click.Choice(["plan", "graph", "all"]), default="all", show_default=True, help="Which entries."
)
@dir_option
@json_option
def list_entries(kind: str, dir: Path | None, as_json: bool) -> None:
    """List the entries of the vault: graphs, and plans that say which graphs a pipeline needs for a call.

    \b
    Examples:
      pipevault ls
      pipevault ls --kind plan
      pipevault ls --dir /srv/vault --json
    """
    if as_json:
        root, whole, broken = read_entries(dir)
        whole = [entry for entry in whole if kind in ("all", entry.key.kind)]
        render.print_json(
            {
                "vault": str(root),
                "entries": [_entry_document(entry) for entry in whole],
                "broken": [_broken_document(entry) for entry in broken],
            }
        )
        _note_broken(broken)
        return
    root, rows, broken = list_rows(dir, _entry_cells)
    rows = [row for row in rows if kind in ("all", row.cells[0])]
    if rows:
        columns = ("KEY", "KIND", "PIPELINE", "CALL", "DTYPE", "PARTS", "SIZE", "FROZEN")
        now = datetime.now(timezone.utc)
        cells = [
            (row.key.short, *row.cells, render.size_text(row.size_bytes), render.age_text(row.created_at, now))
            for row in sorted(rows, key=lambda row: row.created_at, reverse=True)
        ]
        render.show_rows(columns, cells, right=("SIZE",))
    total_bytes = sum({digits: size for row in rows for digits, size in row.artifacts.items()}.values())
    render.note(f"{render.count_text(len(rows), 'entry', 'entries')}, {render.size_text(total_bytes)} in {root}")
    for entry in broken:
        render.note(f"{entry.key.short} cannot be used: {entry.reason}")
    _note_broken(broken)


@click.command("show", short_help="Show one entry.")
@click.argument("key", metavar="KEY")
@dir_option
@json_option
def show(key: str, dir: Path | None, as_json: bool) -> None:
    """Show the entry whose key begins with KEY: its factors, its parts, its artifacts and what it needs.

    \b
    Examples:
      pipevault show 3f9a2c
      pipevault show 3f9a2c --json
    """
    vault = open_vault(dir)
    manifest = vault.find(key)
    signatures = entry_signatures(vault, manifest, Settings.resolve(dir=dir))
    if as_json:
        render.print_json(
            {
                **_entry_document(manifest),
                "manifest": str(vault.layout.manifest_file(manifest.key.digest)),
                "artifacts": [
                    {"name": ref.name, "digest": ref.digest.hex, "size_bytes": ref.size_bytes}
                    for ref in manifest.artifacts
                ],
                "signatures": signatures_document(signatures),
                "info": dict(manifest.info),
            }
        )
        return
    facts = [
        ("key", manifest.key.digest.hex),
        ("kind", manifest.key.kind),
        ("shelf", manifest.key.shelf.hex),
        ("frozen", f"{manifest.created_at} ({render.age_text(manifest.created_at)})"),
        ("size", render.size_text(manifest.size_bytes)),
        ("manifest", str(vault.layout.manifest_file(manifest.key.digest))),
        ("signatures", signatures_text(signatures)),
        *((name, render.value_text(value)) for name, value in render.flat(manifest.info) if name),
    ]
    parts = [(name, _part_text(part)) for name, part in manifest.parts.items()]
    artifacts = [(ref.name, render.size_text(ref.size_bytes), ref.digest.hex) for ref in manifest.artifacts]
    factors = [(name, render.value_text(value)) for name, value in render.flat(manifest.key.factors)]
    needs = [
        (key.hex, "in the vault" if vault.layout.manifest_file(key).exists() else "not in the vault")
        for key in manifest.needs
    ]
    render.show(
        render.facts(facts),
        render.table(("PART", "STATE"), parts),
        *([render.table(("NEEDS", "WHERE"), needs)] if needs else []),
        render.table(("ARTIFACT", "SIZE", "SHA-256"), artifacts, right=("SIZE",)),
        render.table(("FACTOR", "VALUE"), factors),
    )


@click.command("where", short_help="Print the vault's folder.")
@dir_option
@json_option
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


def _note_broken(broken: Sequence[BrokenManifest]) -> None:
    if broken:
        number = render.count_text(len(broken), "entry is", "entries are")
        render.note(f"{number} damaged, or of a later pipevault: `pipevault doctor` says what to do.")


def _entry_document(manifest: Manifest) -> dict[str, Any]:
    return {
        "key": manifest.key.digest.hex,
        "kind": manifest.key.kind,
        "shelf": manifest.key.shelf.hex,
        "needs": [key.hex for key in manifest.needs],
        "created_at": manifest.created_at,
        "size_bytes": manifest.size_bytes,
        "factors": dict(manifest.key.factors),
        "parts": dict(manifest.parts),
    }


def _broken_document(entry: BrokenManifest) -> dict[str, str]:
    return {"key": entry.key.hex, "path": str(entry.path), "reason": entry.reason}


def _entry_cells(manifest: Manifest) -> tuple[str, ...]:
    """What stands under KIND to PARTS: of a graph the class of its part, and its signature in place of a call."""
    factors = manifest.key.factors
    if manifest.key.kind == "graph":
        return (
            manifest.key.kind,
            _part_class_text(factors),
            str(manifest.info.get("signature_text", "")),
            _dtype_text(factors.get("dtype")) if "dtype" in factors else "",
            ", ".join(manifest.parts),
        )
    return (
        manifest.key.kind,
        _pipeline_text(factors.get("pipeline")),
        _call_text(factors.get("call")),
        _dtype_text(factors.get("dtype")),
        ", ".join(name if _is_frozen(part) else f"{name} (eager)" for name, part in _called_parts(manifest)),
    )


def _pipeline_text(pipeline: Any) -> str:
    return _leaf_texts(pipeline)[0].rpartition(".")[2]


def _part_class_text(factors: Mapping[str, Any]) -> str:
    """The last name of the first ``class`` that the architecture of a part, or else its other factors, tell of."""
    leaves = [*render.flat(factors.get("architecture", {})), *render.flat(factors)]
    classes = (value for name, value in leaves if name.rpartition(".")[2] == "class" and isinstance(value, str))
    return next((value.rpartition(".")[2] for value in classes), "")


def _dtype_text(dtype: Any) -> str:
    return ", ".join(dict.fromkeys(_leaf_texts(dtype)))


def _call_text(call: Any) -> str:
    """``768x512, 9 frames, batch 2, guidance``, then each further factor with its name unless it is as usual."""
    if not isinstance(call, Mapping):
        return render.value_text(call)
    usual = {"batch_size": 1, "prompts": call.get("batch_size"), "images_per_prompt": 1, "output": "decoded"}
    rest = {name: value for name, value in call.items() if value is not None and value != usual.get(name)}
    texts = []
    if {"width", "height"} <= rest.keys():
        texts.append(f"{rest.pop('width')}x{rest.pop('height')}")
    for name, form in (("num_frames", "{} frames"), ("batch_size", "batch {}")):
        if name in rest:
            texts.append(form.format(rest.pop(name)))
    if rest.pop("guidance", None):
        texts.append("guidance")
    leaves = ((name.removeprefix("arguments."), value) for name, value in render.flat(rest) if name)
    return ", ".join([*texts, *(f"{name}={render.value_text(value)}" for name, value in leaves)])


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
    """``frozen, 2 graphs for 19 FluxTransformerBlock`` or ``eager: reason``; what has another form stands as it is."""
    if not isinstance(part, Mapping) or "status" not in part:
        return render.value_text(part)
    graphs = part.get("graphs")
    number = graphs if isinstance(graphs, int) else len(graphs) if graphs else 0
    regions = f" for {part['regions']}" if part.get("regions") else ""
    counted = f", {render.count_text(number, 'graph', 'graphs')}{regions}" if number else ""
    reason = f": {part['reason']}" if part.get("reason") else ""
    return f"{part['status']}{counted}{reason}"
