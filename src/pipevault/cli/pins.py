"""``pipevault pin``, ``unpin`` and ``pins``: entries that no pruning removes."""

from __future__ import annotations

from pathlib import Path

import click

from pipevault.cli import render
from pipevault.cli.options import command, open_vault, vault_options
from pipevault.store.retention.pins import read_pins


@command("pin", short_help="Keep an entry from being removed.")
@click.argument("key", metavar="KEY")
@click.option("--name", metavar="NAME", required=True, help="Name of the pin, such as prod.")
@click.option("--move", is_flag=True, help="Take the name from the entry that it pins now.")
@vault_options
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
        render.print_json({"name": name, "key": found, "moved_from": before})
        return
    render.say(f"Pinned {found.short} as {name}{f', moved from {before.short}' if before else ''}")


@command("unpin", short_help="Remove a pin.")
@click.argument("name", metavar="NAME")
@vault_options
def unpin(name: str, dir: Path | None, as_json: bool) -> None:
    """Remove the pin NAME. The entry stays until something removes it.

    \b
    Examples:
      pipevault unpin prod
    """
    key = open_vault(dir).unpin(name)
    if as_json:
        render.print_json({"name": name, "key": key})
        return
    render.say(f"Unpinned {name}{f', which was {key.short}' if key else ', which could not be read'}")


@command("pins", short_help="List the pins.")
@vault_options
def pins(dir: Path | None, as_json: bool) -> None:
    """List the pins and their entries.

    \b
    Examples:
      pipevault pins
      pipevault pins --json
    """
    found = read_pins(open_vault(dir).layout)
    if as_json:
        render.print_json({"pins": found})
        return
    for pin in found:
        if pin.problem:
            render.note(f"{pin.name}: {pin.problem}")
    render.show(render.table(("NAME", "KEY"), [(pin.name, pin.key.short if pin.key else "?") for pin in found]))
    render.note(render.count_text(len(found), "pin"))
