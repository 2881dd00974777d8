"""``pipevault rm`` and ``pipevault prune``: remove entries, and what nothing needs any more."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click

from pipevault.cli import render
from pipevault.cli.options import command, dry_run_option, keys_argument, open_vault, vault_options
from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, NewerVaultError, SettingsError
from pipevault.fingerprint.toolchain import package_version
from pipevault.settings import Settings
from pipevault.settings.values import parse_amount, parse_limit
from pipevault.store.manifest import Manifest
from pipevault.store.matching import matching
from pipevault.store.retention.prune import Pruning, carry_out, plan_prune
from pipevault.store.retention.removal import Removal, find_orphans, refuse_in_use
from pipevault.store.vault import Vault

_AGE_UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}


@command("rm", short_help="Remove entries, or artifacts that no entry names.")
@keys_argument
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
    too_young: tuple[Digest, ...] = ()
    if orphans:
        plan, young = find_orphans(vault.layout)
        too_young = young.artifacts
    else:
        found_keys = sorted({_find_key(vault, prefix) for prefix in keys})
        plan = vault.plan_removal(found_keys, with_needed=with_graphs, shown=dry_run or not yes)
        refuse_in_use(vault.layout, plan.keys, ignore_leases=force)
    if not dry_run and (plan.keys or plan.artifacts):
        if not yes:
            _confirm(plan)
            if plan.keys:  # they may have been loaded or pinned during the question
                refuse_in_use(vault.layout, plan.keys, ignore_leases=force)
        plan = vault.remove(plan, ignore_leases=force)
    _report_removal(plan, dry_run=dry_run, too_young=too_young, as_json=as_json)


def _find_key(vault: Vault, prefix: str) -> Digest:
    try:
        return vault.find(prefix).key.digest
    except (CorruptEntryError, NewerVaultError) as error:
        # A manifest that cannot be read can be removed all the same.
        if key := vault.layout.key_of_manifest(error.path):
            return key
        raise


def _confirm(plan: Removal) -> None:
    if not _is_interactive():
        raise SettingsError("rm asks before it removes, and standard input is not a terminal: give --yes or --dry-run.")
    click.confirm(f"Remove {_what(plan)} ({render.size_text(plan.size_bytes)})?", abort=True, err=True)


def _is_interactive() -> bool:
    return sys.stdin.isatty()


def _report_removal(done: Removal, *, dry_run: bool, too_young: Sequence[Digest], as_json: bool) -> None:
    if as_json:
        digests = {"keys": done.keys, "artifacts": done.artifacts, "shared": done.shared, "too_young": too_young}
        render.print_json({"dry_run": dry_run, **digests, "size_bytes": done.size_bytes})
        return
    verb = "Would remove" if dry_run else "Removed"
    for key in done.keys or done.artifacts:
        render.say(f"{verb} {key.short}")
    kept = [
        f"; {render.count_text(len(digests), 'artifact stays', 'artifacts stay')}, {reason}"
        for digests, reason in ((done.shared, "which other entries name"), (too_young, "younger than an hour"))
        if digests
    ]
    render.note(f"{verb} {_what(done)}, {render.size_text(done.size_bytes)}{''.join(kept)}.")


def _what(done: Removal) -> str:
    artifacts = render.count_text(len(done.artifacts), "artifact")
    if not done.keys:
        return f"{artifacts} that no entry names"
    return f"{render.count_text(len(done.keys), 'entry', 'entries')} and {artifacts}"


@command("prune", short_help="Remove what is old, unused or too much.")
@click.option(
    "--max-size",
    metavar="SIZE",
    help="Least recently used first, down to SIZE: 20GB, 500MiB, none. Default: the setting.",
)
@click.option("--older-than", metavar="AGE", help="What was not used for AGE: 30d, 12h, 90min, 2w.")
@click.option("--unused", is_flag=True, help="What was published over an hour ago and never used.")
@click.option(
    "--toolchain", type=click.Choice(["old"]), help="What another torch, or another of its packages, compiled."
)
@click.option("--model", metavar="CLASS", help="What is of a pipeline or part of CLASS: StableDiffusionPipeline.")
@click.option("--machine", metavar="NAME", help="What is for machines of NAME: cpu, cuda, x86_64.")
@click.option("--dtype", metavar="NAME", help="What is for weights of dtype NAME: float32, bfloat16.")
@dry_run_option
@vault_options
def prune(
    max_size: str | None,
    older_than: str | None,
    unused: bool,
    dry_run: bool,
    dir: Path | None,
    as_json: bool,
    **chosen: str | None,
) -> None:
    """Remove entries that are old, unused or more than the vault may hold, and what dead processes left.

    What is given of --toolchain, --model, --machine and --dtype must all fit an entry for it to go; with a plan go its
    graphs that nothing else needs. A value that no entry has is an error. Without an option the setting max_size
    decides, if there is one. Pinned entries, entries that a live process has loaded, and the graphs that such plans
    need stay. Artifacts that no entry names go when they are older than an hour, and quarantined files after 30 days or
    when they are more than 1 GB.

    \b
    Examples:
      pipevault prune --dry-run
      pipevault prune --max-size 20GB
      pipevault prune --older-than 30d --unused --json
      pipevault prune --toolchain old --dtype float16 --dry-run
    """
    limit = parse_limit("--max-size", max_size)
    age_s = _age_s(older_than)
    wanted = {name: value for name, value in chosen.items() if value is not None}
    if wanted and (max_size is not None or age_s is not None or unused):
        raise SettingsError(f"--{next(iter(wanted))} goes without --max-size, --older-than and --unused: prune twice.")
    if max_size is None and age_s is None and not unused and not wanted:
        limit = Settings.resolve(dir=dir).max_size
    vault = open_vault(dir)
    plan = plan_prune(vault, max_size=limit, older_than_s=age_s, unused=unused, chosen=_chosen(vault, wanted))
    done = replace(plan, staying=()) if dry_run else carry_out(vault, plan)
    if not as_json:
        _report_pruning(plan, done, dry_run=dry_run)
        return
    render.print_json(
        {
            "dry_run": dry_run,
            "max_size": plan.max_size,
            "size_bytes": plan.size_bytes,
            "freed_bytes": done.freed_bytes,
            "left_bytes": done.left_bytes,
            "entries": [{"key": going.key, "reason": going.reason} for going in done.entries],
            "artifacts": sorted((*done.artifacts, *done.orphans)),
            "quarantined": done.quarantined,
            "leftovers": done.leftovers,
            "staying": (*plan.staying, *done.staying),
            "not_reached": plan.because,
            "problems": done.problems,
        }
    )


def _chosen(vault: Vault, wanted: Mapping[str, str]) -> dict[Digest, str]:
    def is_old(entry: Manifest) -> bool:
        """Tell whether a package of this machine has another version; ``graph_format`` is pipevault's own."""
        packages = entry.key.factors.get("toolchain")
        versions = packages.items() if isinstance(packages, Mapping) else ()
        return any(name != "graph_format" and version != package_version(name) for name, version in versions)

    if not wanted:
        return {}
    entries = [entry for entry in vault.manifests() if isinstance(entry, Manifest)]
    return matching(entries, wanted, is_old)


def _age_s(text: str | None) -> float | None:
    if text is None:
        return None
    age_s = parse_amount(text, _AGE_UNITS_S)
    if age_s is None:
        units = ", ".join(_AGE_UNITS_S)
        raise SettingsError(
            f"Invalid age {text!r} for --older-than: expected a number and one of {units}, such as 30d."
        )
    if text.strip().startswith("-"):
        raise SettingsError(f"Invalid age {text!r} for --older-than: expected 0 or more.")
    return age_s


def _report_pruning(plan: Pruning, done: Pruning, *, dry_run: bool) -> None:
    verb = "Would remove" if dry_run else "Removed"
    for going in done.entries:
        render.say(f"{verb} {going.key.short} ({going.reason})")
    for entry in (*plan.staying, *done.staying):
        render.note(f"{entry.key.short} stays: {entry.reason}")
    for problem in done.problems:
        render.note(problem)
    if done.leftovers:
        size = render.size_text(sum(item.size_bytes for item in done.leftovers))
        render.note(f"{verb} {render.count_text(len(done.leftovers), 'leftover')} of dead processes: {size}.")
    entries = render.count_text(len(done.entries), "entry", "entries")
    what = f"{entries}, {render.count_text(len(done.artifacts) + len(done.orphans), 'artifact')}"
    if done.quarantined:
        what = f"{what}, {render.count_text(len(done.quarantined), 'quarantined file')}"
    freed, before, left = (render.size_text(size) for size in (done.freed_bytes, plan.size_bytes, done.left_bytes))
    render.note(f"{verb} {what}: {freed} of {before}; {left} left.")
    if plan.because and plan.max_size is not None:
        reached, wanted = render.size_text(plan.left_bytes), render.size_text(plan.max_size)
        render.note(f"Cannot get below {reached} (asked for {wanted}) because {'; '.join(plan.because)}.")
