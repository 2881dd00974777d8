"""``pipevault stats``: the counts of a vault's processes, for people, programs and Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipevault.cli import render
from pipevault.cli.options import vault_options
from pipevault.cli.vaults import open_vault
from pipevault.errors import CannotSaveError, SettingsError, VaultError

if TYPE_CHECKING:
    from pipevault.digest import Digest
    from pipevault.store.stats.summary import Counts, Statistics

_SHOWN_ENTRIES = 30


@click.command("stats", short_help="Show hits, misses, and the compile time that they saved or cost.")
@click.argument("key", metavar="[KEY]", required=False)
@click.option(
    "--prometheus",
    metavar="FILE",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Write a text file for node_exporter's textfile collector; - prints it.",
)
@vault_options
def stats(key: str | None, prometheus: Path | None, dir: Path | None, as_json: bool) -> None:
    """Show what all processes counted that used the vault: hits, misses by reason, compile seconds spent and saved.

    With KEY, the beginning of a key, only what belongs to that entry; it may have been removed since.

    \b
    Examples:
      pipevault stats
      pipevault stats 3f9a2c --json
      pipevault stats --prometheus /var/lib/node_exporter/pipevault.prom
    """
    from pipevault.store.stats.summary import Counts, find_entry, summary

    if prometheus is not None and (key is not None or as_json):
        raise SettingsError("--prometheus writes all entries in its own format: leave out KEY and --json.")
    vault = open_vault(dir)
    found = summary(vault.layout)
    for problem in found.unreadable:
        render.note(f"Not counted: {problem}")
    if prometheus is not None:
        _write_prometheus(prometheus, found, vault.root)
    elif key is not None:
        digest = find_entry(vault.layout, found, key)
        counts = found.entries.get(digest, Counts())
        if as_json:
            render.print_json({"vault": str(vault.root), "key": digest.hex, **counts.to_json()})
        else:
            render.show(render.facts([("key", digest.hex), *_facts(counts)]))
    elif as_json:
        render.print_json({"vault": str(vault.root), **found.to_json()})
    else:
        _show(found, vault.root)


def _show(found: Statistics, root: Path) -> None:
    entries = render.count_text(found.stored_entries, "entry", "entries")
    facts = render.facts(
        [
            ("vault", str(root)),
            ("holds", f"{entries}, {render.size_text(found.stored_bytes)}"),
            ("counted since", found.since or "nothing was counted yet"),
            *_facts(found.total),
        ]
    )
    busiest = sorted(found.entries.items(), key=lambda item: (-item[1].hits, -item[1].missed, item[0]))
    rows = [_row(key, counts) for key, counts in busiest[:_SHOWN_ENTRIES]]
    render.show(facts, *([render.table(("KEY", *_COLUMNS), rows, right=_COLUMNS)] if rows else []))
    if len(busiest) > _SHOWN_ENTRIES:
        render.note(f"{len(busiest) - _SHOWN_ENTRIES} more entries; --json lists all.")


def _facts(counts: Counts) -> list[tuple[str, str]]:
    reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(counts.misses.items()))
    texts = {name.lower(): text(counts) for name, text in _MEASURES.items()}
    return list({**texts, "misses": f"{counts.missed} ({reasons})" if reasons else "0"}.items())


def _row(key: Digest, counts: Counts) -> tuple[str, ...]:
    return (key.short, *(_MEASURES[name](counts) for name in _COLUMNS))


def _rate(counts: Counts) -> str:
    return "-" if counts.hit_rate is None else f"{100 * counts.hit_rate:.1f} %"


def duration_text(seconds: float) -> str:
    """Return a duration as ``0 s``, ``12.5 s``, ``3 min 20 s`` or ``27 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds else "0 s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_min = divmod(minutes, 60)
    return f"{hours} h {rest_min} min" if hours else f"{minutes} min {rest_s} s"


def _write_prometheus(path: Path, found: Statistics, root: Path) -> None:
    from pipevault.cli.prometheus import exposition
    from pipevault.files.atomic import write_file

    text = exposition(found, root)
    if str(path) == "-":
        render.say(text, nl=False)
        return
    if path.suffix != ".prom":
        raise SettingsError(f"{path} does not end in .prom, and node_exporter reads no other files. Rename it.")
    try:
        write_file(path, text.encode())
    except VaultError as error:
        raise CannotSaveError(str(error), path) from error


_MEASURES: Mapping[str, Callable[[Counts], str]] = {
    "HITS": lambda counts: str(counts.hits),
    "MISSES": lambda counts: str(counts.missed),
    "HIT RATE": _rate,
    "COMPILED": lambda counts: str(counts.compiled),
    "COMPILE TIME": lambda counts: duration_text(counts.compile_s),
    "SAVED": lambda counts: duration_text(counts.saved_s),
    "REBUILT": lambda counts: str(counts.rebuilt),
    "QUARANTINED": lambda counts: str(counts.quarantined),
    "PUBLISHED": lambda counts: f"{counts.published}, {render.size_text(counts.published_bytes)}",
}
_COLUMNS = ("HITS", "MISSES", "HIT RATE", "COMPILE TIME", "SAVED", "PUBLISHED")
"""The measures of each entry that fit 80 columns; --json has all."""
