"""``pipevault rm``: remove entries, or the artifacts that no entry names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipevault.cli import render
from pipevault.cli.options import dry_run_option, vault_options
from pipevault.cli.vaults import open_vault
from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, NewerVaultError, SettingsError

if TYPE_CHECKING:
    from pipevault.store.retention.removal import RemovalPlan, RemovalReport
    from pipevault.store.vault import Vault


@click.command("rm", short_help="Remove entries, or artifacts that no entry names.")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option("--with-graphs", is_flag=True, help="Of a plan, also the graphs that no other plan needs.")
@click.option("--orphans", is_flag=True, help="Remove the artifacts that no entry names, older than an hour.")
@click.option("--force", is_flag=True, help="Remove entries that a live process has loaded, too; never pinned ones.")
@dry_run_option
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@vault_options
def remove(
    keys: tuple[str, ...],
    with_graphs: bool,
    orphans: bool,
    force: bool,
    dry_run: bool,
    yes: bool,
    dir: Path | None,
    as_json: bool,
) -> None:
    """Remove the entries, graphs or plans, whose keys begin with KEY, and the artifacts that no other entry uses.

    The graphs of a plan stay unless --with-graphs is given. An entry that is pinned, or that a live process has
    loaded, is not removed, and neither is a graph that such a plan needs: that is an error, and nothing is.

    With --orphans remove what no entry names at all: what a freeze left behind that died before its entry was
    written. A younger one than an hour stays, for a freeze may be about to name it.

    \b
    Examples:
      pipevault rm 3f9a2c --dry-run
      pipevault rm 3f9a2c 77b01e --yes
      pipevault rm 3f9a2c --with-graphs --yes
      pipevault rm 3f9a2c --force
      pipevault rm --orphans --dry-run
    """
    if bool(keys) is orphans:
        raise SettingsError("rm removes entries or orphans: give the beginning of a KEY, or --orphans alone.")
    if with_graphs and orphans:
        raise SettingsError("--with-graphs goes with a KEY: give --orphans alone.")
    vault = open_vault(dir)
    plan, too_young = _plan_orphans(vault) if orphans else (_plan_entries(vault, keys, force, with_graphs), ())
    if dry_run or not (plan.keys or plan.artifacts):
        _report(plan, plan.size_bytes, dry_run=dry_run, too_young=too_young, as_json=as_json)
        return
    if not yes:
        _confirm(plan)
        _refuse_in_use(vault, plan.keys, force)  # it may have been loaded or pinned during the question
    report = vault.remove(plan, ignore_leases=force)
    _report(report, report.freed_bytes, dry_run=False, too_young=too_young, as_json=as_json)


def _plan_entries(vault: Vault, prefixes: Sequence[str], force: bool, with_graphs: bool) -> RemovalPlan:
    keys = sorted({_find_key(vault, prefix) for prefix in prefixes})
    plan = vault.plan_removal(keys, with_needed=with_graphs)
    _refuse_in_use(vault, plan.keys, force)
    return plan


def _refuse_in_use(vault: Vault, keys: Sequence[Digest], force: bool) -> None:
    from pipevault.store.retention.removal import refuse_in_use

    if keys:
        refuse_in_use(vault.layout, keys, ignore_leases=force)


def _plan_orphans(vault: Vault) -> tuple[RemovalPlan, tuple[Digest, ...]]:
    """Return the plan, and the orphans that are too young for it."""
    from pipevault.store.retention.removal import find_orphans, plan_orphans_removal

    orphans = find_orphans(vault.layout)
    return plan_orphans_removal(orphans), tuple(orphan.digest for orphan in orphans if not orphan.removable)


def _find_key(vault: Vault, prefix: str) -> Digest:
    try:
        return vault.find(prefix).key.digest
    except (CorruptEntryError, NewerVaultError) as error:
        # A manifest that cannot be read can be removed all the same.
        if key := vault.layout.key_of_manifest(error.path):
            return key
        raise


def _confirm(plan: RemovalPlan) -> None:
    if not _is_interactive():
        raise SettingsError("rm asks before it removes, and standard input is not a terminal: give --yes or --dry-run.")
    click.confirm(f"Remove {_what(plan)} ({render.size_text(plan.size_bytes)})?", abort=True, err=True)


def _is_interactive() -> bool:
    return sys.stdin.isatty()


def _report(
    done: RemovalPlan | RemovalReport,
    size_bytes: int,
    *,
    dry_run: bool,
    too_young: Sequence[Digest],
    as_json: bool,
) -> None:
    if as_json:
        render.print_json(
            {
                "dry_run": dry_run,
                "keys": [key.hex for key in done.keys],
                "artifacts": [digest.hex for digest in done.artifacts],
                "shared": [digest.hex for digest in done.shared],
                "too_young": [digest.hex for digest in too_young],
                "size_bytes": size_bytes,
            }
        )
        return
    verb = "Would remove" if dry_run else "Removed"
    for key in done.keys or done.artifacts:
        render.say(f"{verb} {key.short}")
    kept = [
        f"; {render.count_text(len(digests), 'artifact stays', 'artifacts stay')}, {reason}"
        for digests, reason in ((done.shared, "which other entries name"), (too_young, "younger than an hour"))
        if digests
    ]
    render.note(f"{verb} {_what(done)}, {render.size_text(size_bytes)}{''.join(kept)}.")


def _what(done: RemovalPlan | RemovalReport) -> str:
    artifacts = render.count_text(len(done.artifacts), "artifact", "artifacts")
    if not done.keys:
        return f"{artifacts} that no entry names"
    return f"{render.count_text(len(done.keys), 'entry', 'entries')} and {artifacts}"
