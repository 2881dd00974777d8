"""``pipevault stats``: the counts of a vault's processes, for people, programs and Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import click

from pipevault.cli import render
from pipevault.cli.options import command, open_vault, vault_options
from pipevault.errors import SettingsError
from pipevault.evidence.files import write_data
from pipevault.store.stats.summary import Counts, Statistics, find_entry, summary

_SHOWN_ENTRIES = 30
_COLUMNS = ("HITS", "MISSES", "HIT RATE", "COMPILE TIME", "SAVED", "PUBLISHED")
"""The measures of each entry that fit 80 columns; --json has all."""
_MEASURES: Mapping[str, Callable[[Counts], str]] = {
    "HITS": lambda counts: str(counts.hits),
    "MISSES": lambda counts: str(counts.missed),
    "HIT RATE": lambda counts: "-" if counts.hit_rate is None else f"{100 * counts.hit_rate:.1f} %",
    "COMPILED": lambda counts: str(counts.compiled),
    "COMPILE TIME": lambda counts: duration_text(counts.compile_s),
    "SAVED": lambda counts: duration_text(counts.saved_s),
    "REBUILT": lambda counts: str(counts.rebuilt),
    "QUARANTINED": lambda counts: str(counts.quarantined),
    "PUBLISHED": lambda counts: f"{counts.published}, {render.size_text(counts.published_bytes)}",
}
_COUNTERS = (
    ("hits_total", "hits", "Loads that found their entry."),
    ("compiles_total", "compiled", "Times that graphs were compiled."),
    ("compile_seconds_total", "compile_s", "Seconds spent compiling."),
    ("saved_seconds_total", "saved_s", "Compile seconds that hits did not spend."),
    ("rebuilds_total", "rebuilt", "Entries that were there and were frozen again."),
    ("quarantined_total", "quarantined", "Bad files that were moved away."),
    ("published_total", "published", "Entries published."),
    ("published_bytes_total", "published_bytes", "Bytes of artifacts published."),
)
"""Names of counters for Prometheus, the fields of :class:`Counts` that they show, and what they count."""


@command("stats", short_help="Show hits, misses, and the compile time that they saved or cost.")
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
            render.print_json({"vault": vault.root, "key": digest, **counts.to_json()})
        else:
            render.show(render.facts([("key", digest.hex), *_facts(counts)]))
    elif as_json:
        render.print_json({"vault": vault.root, **found.to_json()})
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
    rows = [(key.short, *(_MEASURES[name](counts) for name in _COLUMNS)) for key, counts in busiest[:_SHOWN_ENTRIES]]
    render.show(facts, render.table(("KEY", *_COLUMNS), rows, right=_COLUMNS))
    if len(busiest) > _SHOWN_ENTRIES:
        render.note(f"{len(busiest) - _SHOWN_ENTRIES} more entries; --json lists all.")


def _facts(counts: Counts) -> list[tuple[str, str]]:
    reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(counts.misses.items()))
    texts = {name.lower(): text(counts) for name, text in _MEASURES.items()}
    return list({**texts, "misses": f"{counts.missed} ({reasons})" if reasons else "0"}.items())


def duration_text(seconds: float) -> str:
    """Return a duration as ``0 s``, ``12.5 s``, ``3 min 20 s`` or ``27 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds else "0 s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_min = divmod(minutes, 60)
    return f"{hours} h {rest_min} min" if hours else f"{minutes} min {rest_s} s"


def _write_prometheus(path: Path, found: Statistics, root: Path) -> None:
    text = exposition(found, root)
    if str(path) == "-":
        render.say(text, nl=False)
        return
    if path.suffix != ".prom":
        raise SettingsError(f"{path} does not end in .prom, and node_exporter reads no other files. Rename it.")
    write_data(path, text.encode())


def exposition(found: Statistics, root: Path) -> str:
    """Return all of ``found`` in Prometheus' text format 0.0.4.
    https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
    """
    vault, total = {"vault": str(root)}, found.total
    size = "Bytes of manifests and artifacts in the vault."
    misses = [({**vault, "reason": reason}, count) for reason, count in sorted(total.misses.items())]
    lines = [
        *_family("entries", "gauge", "Entries in the vault.", [(vault, found.stored_entries)]),
        *_family("size_bytes", "gauge", size, [(vault, found.stored_bytes)]),
        *_family("misses_total", "counter", "Loads that found no usable entry, by reason.", misses),
    ]
    for name, field, text in _COUNTERS:
        lines += _family(name, "counter", text, [(vault, getattr(total, field))])
    for name, field, text in (("misses_total", "missed", "Loads that found no usable entry."), *_COUNTERS):
        by_key = [({**vault, "key": key.hex}, getattr(counts, field)) for key, counts in found.entries.items()]
        lines += _family(f"entry_{name}", "counter", f"{text} By entry.", by_key)
    return "".join(f"{line}\n" for line in lines)


def _family(name: str, kind: str, text: str, samples: Sequence[tuple[Mapping[str, str], float]]) -> Iterator[str]:
    yield f"# HELP pipevault_{name} {text}"
    yield f"# TYPE pipevault_{name} {kind}"
    for labels, value in samples:
        listed = ",".join(f'{label}="{_escaped(given)}"' for label, given in labels.items())
        yield f"pipevault_{name}{{{listed}}} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
