"""``pipevault pin``, ``unpin`` and ``pins``: entries that no pruning removes."""

from __future__ import annotations

from pathlib import Path

import click

from pipevault.cli import render
from pipevault.cli.options import dir_option, json_option
from pipevault.cli.vaults import open_vault
from pipevault.errors import PinError


@click.command("pin", short_help="Keep an entry from being removed.")
@click.argument("key", metavar="KEY")
@click.option("--name", metavar="NAME", required=True, help="Name of the pin, such as prod.")
@click.option("--move", is_flag=True, help="Take the name from the entry that it pins now.")
@dir_option
@json_option
def pin(key: str, name: str, move: bool, dir: Path | None, as_json: bool) -> None:
    """Keep the entry whose key begins with KEY: `prune` and `rm` leave it, and with a plan the graphs that it needs,
    until it is unpinned.

    \b
    Examples:
      pipevault pin 3f9a2c --name prod
      pipevault pin 77b01e --name prod --move
    """
    vault = open_vault(dir)
    found = vault.find(key).key.digest
    before = vault.pin(found, name, move=move)
    if as_json:
        render.print_json({"name": name, "key": found.hex, "moved_from": before.hex if before else None})
        return
    render.say(f"Pinned {found.hex} as {name}{f', moved from {before.short}' if before else ''}")


@click.command("unpin", short_help="Remove a pin.")
@click.argument("name", metavar="NAME")
@dir_option
@json_option
def unpin(name: str, dir: Path | None, as_json: bool) -> None:
    """Remove the pin NAME. The entry stays until something removes it.

    \b
    Examples:
      pipevault unpin prod
    """
    key = open_vault(dir).unpin(name)
    if as_json:
        render.print_json({"name": name, "key": key.hex if key else None})
        return
    render.say(f"Unpinned {name}{f', which was {key.hex}' if key else ', which could not be read'}")


@click.command("pins", short_help="List the pins.")
@dir_option
@json_option
def pins(dir: Path | None, as_json: bool) -> None:
    """List the pins and their entries.

    \b
    Examples:
      pipevault pins
      pipevault pins --json
    """
    from pipevault.store.retention.pins import pin_names, read_pin

    layout = open_vault(dir).layout
    rows: list[tuple[str, str | None, str]] = []
    for name in pin_names(layout):
        try:
            key = read_pin(layout, name)
        except PinError as error:
            rows.append((name, None, str(error)))
            continue
        if key is not None:
            rows.append((name, key.hex, "" if layout.manifest_file(key).exists() else "there is no such entry"))
    if as_json:
        render.print_json({"pins": [{"name": name, "key": key, "problem": problem} for name, key, problem in rows]})
        return
    for name, _, problem in rows:
        if problem:
            render.note(f"{name}: {problem}")
    if rows:
        render.show(render.table(("NAME", "KEY"), [(name, key or "?") for name, key, _ in rows]))
    render.note(render.count_text(len(rows), "pin", "pins"))
