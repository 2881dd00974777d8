"""The commands that look at a vault: ls, show and where."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipevault.cli import render
from pipevault.cli.keys import entry_signatures, signatures_document, signatures_text
from pipevault.cli.listing import Row, read_rows, row_of
from pipevault.cli.options import vault_options
from pipevault.cli.pins import read_pins
from pipevault.cli.vaults import open_vault, whole_entries
from pipevault.errors import SettingsError
from pipevault.settings import Settings, config_file

if TYPE_CHECKING:
    from pipevault.digest import Digest
    from pipevault.store.manifest import Manifest
    from pipevault.store.vault import Vault


@dataclass(frozen=True)
class _Line:
    """An entry as ``ls`` sorts, filters and shows it. ``used_at``: its last use, ISO 8601; empty for none."""

    row: Row
    used_at: str
    pins: tuple[str, ...]

    def text(self, name: str) -> str:
        """Return what a name in ``--filter`` and ``--sort`` stands for."""
        return ", ".join(self.pins) if name == "pin" else self.row.cells[FIELDS.index(name)]

    def fits(self, name: str, value: str) -> bool:
        """Tell whether ``value`` is one of its texts under ``name``, as in ``cpu`` or ``float16, float32``."""
        return value.lower() in self.text(name).lower().split(", ")

    def cells(self) -> tuple[str, ...]:
        kind, model, call, dtype, torch, device = self.row.cells
        used = render.age_text(self.used_at).removesuffix(" ago").removeprefix("just ") if self.used_at else "never"
        shown = call if kind == "graph" else f"{call}, {dtype}".strip(", ")
        return (
            self.row.key.short,
            model,
            shown,
            torch,
            device,
            render.size_text(self.row.size_bytes),
            used,
            self.text("pin"),
        )


_DIGEST = re.compile("[0-9a-f]{64}")
FIELDS = ("kind", "model", "call", "dtype", "torch", "device")
FILTERS = ("kind", "model", "dtype", "torch", "device", "pin")
_NEWEST_FIRST: Mapping[str, Callable[[_Line], Any]] = {
    "frozen": lambda line: line.row.created_at,
    "used": lambda line: line.used_at,
    "size": lambda line: line.row.size_bytes,
}
_SORTS = (*_NEWEST_FIRST, "model", "torch", "device", "pin")


def _filter(_: click.Context, __: click.Parameter, texts: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [text.partition("=") for text in texts]
    for (name, equals, value), text in zip(pairs, texts, strict=True):
        if not equals or name not in FILTERS:
            if equals and (near := get_close_matches(name, FILTERS, n=1)):
                raise SettingsError(f"Unknown filter {name!r}. Did you mean {near[0]}={value}?")
            raise SettingsError(f"Invalid filter {text!r}: expected NAME=VALUE with NAME one of {', '.join(FILTERS)}.")
    return [(name, value) for name, _equals, value in pairs]


@click.command("ls", short_help="List the entries of the vault.")
@click.option(
    "--kind", type=click.Choice(["plan", "graph", "all"]), default="all", show_default=True, help="Which entries."
)
@click.option("--sort", type=click.Choice(_SORTS), default="frozen", show_default=True, help="Newest, largest first.")
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
    entries = {entry.key.digest: entry for entry in whole_entries(vault)} if as_json else {}
    rows, broken = read_rows(vault, _entry_cells)
    lines = _lines(vault, rows)
    wanted = filters if kind == "all" else [*filters, ("kind", kind)]
    lines = [line for line in lines if all(line.fits(name, value) for name, value in wanted)]
    key = _NEWEST_FIRST.get(sort, lambda line: line.text(sort))
    lines.sort(key=key, reverse=sort in _NEWEST_FIRST)
    if as_json:
        render.print_json(
            {
                "vault": str(vault.root),
                "entries": [
                    {**_entry_document(entry), "last_used_at": line.used_at or None, "pins": list(line.pins)}
                    for line in lines
                    if (entry := entries.get(line.row.key))
                ],
                "broken": [{"key": one.key.hex, "path": str(one.path), "reason": one.reason} for one in broken],
            }
        )
    else:
        if lines:
            columns = ("KEY", "MODEL", "CALL", "TORCH", "DEVICE", "SIZE", "USED", "PIN")
            cells = [line.cells() for line in lines]
            render.show_rows(columns, cells, right=("SIZE",), elastic=("MODEL", "CALL", "DEVICE", "PIN"))
        total_bytes = sum({digits: size for line in lines for digits, size in line.row.artifacts.items()}.values())
        number = render.count_text(len(lines), "entry", "entries")
        render.note(f"{number}, {render.size_text(total_bytes)} in {vault.root}")
        for one in broken:
            render.note(f"{one.key.short} cannot be used: {one.reason}")
    if broken:
        number = render.count_text(len(broken), "entry is", "entries are")
        render.note(f"{number} damaged, or of a later pipevault: `pipevault doctor` says what to do.")


def _lines(vault: Vault, rows: Sequence[Row]) -> list[_Line]:
    from pipevault.store.retention.usage import last_uses_s

    used_s = last_uses_s(vault.layout)
    pins: dict[Digest, list[str]] = {}
    for pin in read_pins(vault.layout):
        if pin.key is not None:
            pins.setdefault(pin.key, []).append(pin.name)
    return [_Line(row, render.time_text(used_s.get(row.key)), tuple(pins.get(row.key, ()))) for row in rows]


@click.command("show", short_help="Show one entry.")
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
    [line] = _lines(vault, [row_of(manifest, _entry_cells)])
    facts = [
        ("key", manifest.key.digest.hex),
        ("kind", manifest.key.kind),
        ("shelf", manifest.key.shelf.hex),
        ("frozen", f"{manifest.created_at} ({render.age_text(manifest.created_at)})"),
        ("used", f"{line.used_at} ({render.age_text(line.used_at)})" if line.used_at else "never"),
        ("pins", line.text("pin") or "none"),
        ("size", render.size_text(manifest.size_bytes)),
        ("manifest", str(vault.layout.manifest_file(manifest.key.digest))),
        ("signatures", signatures_text(signatures)),
    ]
    parts = [(name, _part_text(part)) for name, part in manifest.parts.items()]
    artifacts = [(ref.digest.short, render.size_text(ref.size_bytes), ref.name) for ref in manifest.artifacts]
    needs = [
        (key.short, "in the vault" if vault.layout.manifest_file(key).exists() else "not in the vault")
        for key in manifest.needs
    ]
    tables = [
        render.table(columns, rows, right=("SIZE",))
        for columns, rows in (
            (("PART", "STATE"), parts),
            (("KEY", "NEEDED, AND WHERE"), needs),
            (("SHA-256", "SIZE", "ARTIFACT"), artifacts),
            (("FACTOR", "VALUE"), _leaf_rows(manifest.key.factors)),
            (("FACT", "VALUE"), _leaf_rows(manifest.info)),
        )
        if rows
    ]
    render.show(render.facts(facts), *tables)


def _leaf_rows(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the leaves, digests cut to what tells them apart."""
    texts = [(name, render.value_text(value)) for name, value in render.flat(mapping) if name]
    return [(name, text[:12] if _DIGEST.fullmatch(text) else text) for name, text in texts]


@click.command("where", short_help="Print the vault's folder.")
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
        "key": manifest.key.digest.hex,
        "kind": manifest.key.kind,
        "shelf": manifest.key.shelf.hex,
        "needs": [key.hex for key in manifest.needs],
        "created_at": manifest.created_at,
        "size_bytes": manifest.size_bytes,
        "factors": dict(manifest.key.factors),
        "parts": dict(manifest.parts),
    }


def _entry_cells(manifest: Manifest) -> tuple[str, ...]:
    """Return the texts of :data:`FIELDS`: for a graph the class of its part, and its signature in place of a call."""
    factors, is_graph = manifest.key.factors, manifest.key.kind == "graph"
    toolchain = factors.get("toolchain")
    torch = toolchain.get("torch", "") if isinstance(toolchain, Mapping) else ""
    return (
        manifest.key.kind,
        _part_class_text(factors) if is_graph else _pipeline_text(factors.get("pipeline")),
        str(manifest.info.get("signature_text", "")) if is_graph else _call_text(factors.get("call", {})),
        ", ".join(dict.fromkeys(_leaf_texts(factors["dtype"]))) if "dtype" in factors else "",
        str(torch).partition("+")[0],
        _device_text(factors.get("machine")),
    )


def _device_text(machine: Any) -> str:
    """Return ``cpu``, or ``cuda, NVIDIA H100 PCIe`` for a GPU."""
    leaves = [(name.rpartition(".")[2], value) for name, value in render.flat(machine) if isinstance(value, str)]
    return ", ".join(dict.fromkeys(value for wanted in ("type", "name") for name, value in leaves if name == wanted))


def _pipeline_text(pipeline: Any) -> str:
    return _leaf_texts(pipeline)[0].rpartition(".")[2]


def _part_class_text(factors: Mapping[str, Any]) -> str:
    """Return the last name of the first ``class`` among the architecture of a part, or else its other factors."""
    leaves = [*render.flat(factors.get("architecture", {})), *render.flat(factors)]
    classes = (value for name, value in leaves if name.rpartition(".")[2] == "class" and isinstance(value, str))
    return next((value.rpartition(".")[2] for value in classes), "")


def _call_text(call: Any) -> str:
    """Return ``768x512, 9 frames, batch 2, guidance``, then each further factor with its name unless it is as usual."""
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
