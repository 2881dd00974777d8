"""``pipevault prune``: remove what is old, unused or more than the vault may hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipevault.cli import render
from pipevault.cli.options import dry_run_option, vault_options
from pipevault.cli.vaults import open_vault, whole_entries
from pipevault.errors import SettingsError
from pipevault.settings import Settings
from pipevault.settings.values import parse_limit

if TYPE_CHECKING:
    from pipevault.digest import Digest
    from pipevault.store.manifest import Manifest
    from pipevault.store.retention.prune import PrunePlan, PruneReport, Staying
    from pipevault.store.vault import Vault

_AGE = re.compile(r"(-?\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_AGE_UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}


@click.command("prune", short_help="Remove what is old, unused or too much.")
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
    from pipevault.store.retention.prune import carry_out, plan_prune

    limit = parse_limit("--max-size", max_size)
    age_s = _age_s(older_than)
    wanted = {name: value for name, value in chosen.items() if value is not None}
    if wanted and (max_size is not None or age_s is not None or unused):
        raise SettingsError(f"--{next(iter(wanted))} goes without --max-size, --older-than and --unused: prune twice.")
    if max_size is None and age_s is None and not unused and not wanted:
        limit = Settings.resolve(dir=dir).max_size
    vault = open_vault(dir)
    plan = plan_prune(vault, max_size=limit, older_than_s=age_s, unused=unused, chosen=_chosen(vault, wanted))
    report = None if dry_run else carry_out(vault, plan)
    if as_json:
        render.print_json(_document(plan, report))
    else:
        _tell(plan, report)


def _chosen(vault: Vault, wanted: Mapping[str, str]) -> dict[Digest, str]:
    from pipevault.fingerprint.toolchain import package_version
    from pipevault.store.matching import matching

    def is_old(entry: Manifest) -> bool:
        """Tell whether a package of this machine has another version; ``graph_format`` is pipevault's own."""
        packages = entry.key.factors.get("toolchain")
        versions = packages.items() if isinstance(packages, Mapping) else ()
        return any(name != "graph_format" and version != package_version(name) for name, version in versions)

    if not wanted:
        return {}
    return matching(whole_entries(vault), wanted, is_old)


def _age_s(text: str | None) -> float | None:
    if text is None:
        return None
    match = _AGE.fullmatch(text.strip())
    unit_s = _AGE_UNITS_S.get(match[2].lower()) if match else None
    if match is None or unit_s is None:
        units = ", ".join(_AGE_UNITS_S)
        raise SettingsError(
            f"Invalid age {text!r} for --older-than: expected a number and one of {units}, such as 30d."
        )
    if match[1].startswith("-"):
        raise SettingsError(f"Invalid age {text!r} for --older-than: expected 0 or more.")
    return float(match[1]) * unit_s


def _document(plan: PrunePlan, report: PruneReport | None) -> dict[str, Any]:
    done = plan if report is None else report
    reasons = {going.key: going.reason for going in plan.entries}
    keys = list(reasons) if report is None else report.entries
    artifacts = (*plan.artifacts, *plan.orphans) if report is None else report.artifacts
    return {
        "dry_run": report is None,
        "max_size": plan.max_size,
        "size_bytes": plan.size_bytes,
        "freed_bytes": done.freed_bytes,
        "left_bytes": done.left_bytes,
        "entries": [{"key": key.hex, "reason": reasons[key]} for key in keys],
        "artifacts": sorted(digest.hex for digest in artifacts),
        "quarantined": [str(path) for path in done.quarantined],
        "leftovers": [
            {"path": str(item.path), "size_bytes": item.size_bytes, "reason": item.reason} for item in done.leftovers
        ],
        "staying": [{"key": entry.key.hex, "reason": entry.reason} for entry in _staying(plan, report)],
        "not_reached": list(plan.because),
        "problems": list(done.problems),
    }


def _tell(plan: PrunePlan, report: PruneReport | None) -> None:
    done = plan if report is None else report
    verb = "Would remove" if report is None else "Removed"
    reasons = {going.key: going.reason for going in plan.entries}
    if lines := [f"{verb} {key.short} ({reasons[key]})" for key in (reasons if report is None else report.entries)]:
        render.say("\n".join(lines))
    for entry in _staying(plan, report):
        render.note(f"{entry.key.short} stays: {entry.reason}")
    for problem in done.problems:
        render.note(problem)
    if done.leftovers:
        size_bytes = sum(item.size_bytes for item in done.leftovers)
        render.note(f"{verb} {_count(done.leftovers, 'leftover')} of dead processes: {render.size_text(size_bytes)}.")
    number = len(plan.entries) if report is None else len(report.entries)
    artifacts = len(plan.artifacts) + len(plan.orphans) if report is None else len(report.artifacts)
    quarantined = f", {_count(done.quarantined, 'quarantined file')}" if done.quarantined else ""
    what = f"{render.count_text(number, 'entry', 'entries')}, {render.count_text(artifacts, 'artifact', 'artifacts')}"
    freed, before, left = (render.size_text(size) for size in (done.freed_bytes, plan.size_bytes, done.left_bytes))
    render.note(f"{verb} {what}{quarantined}: {freed} of {before}; {left} left.")
    if plan.because and plan.max_size is not None:
        reached, wanted = render.size_text(plan.left_bytes), render.size_text(plan.max_size)
        render.note(f"Cannot get below {reached} (asked for {wanted}) because {'; '.join(plan.because)}.")


def _staying(plan: PrunePlan, report: PruneReport | None) -> tuple[Staying, ...]:
    return plan.staying if report is None else (*plan.staying, *report.staying)


def _count(items: Sequence[object], noun: str) -> str:
    return render.count_text(len(items), noun, f"{noun}s")
