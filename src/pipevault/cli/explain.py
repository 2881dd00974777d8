"""``pipevault explain``: what a load of a pipeline would do, and why."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pipevault.cli import render
from pipevault.cli.options import Parts, call_options, mode_option, model_argument, take, vault_options
from pipevault.cli.pipelines import shapes_of
from pipevault.errors import NotAVaultError
from pipevault.opening import open_pipeline
from pipevault.settings import Settings
from pipevault.store.vault import Vault

IN_MODE = {
    ("hit", "compile"): "would load the entry",
    ("hit", "require"): "would load the entry",
    ("miss", "compile"): "would compile and store an entry",
    ("miss", "require"): "would be an error: mode is require",
}
"""The effect of a load, by what is in the vault and by mode; in mode ``off`` it never does anything."""


@click.command("explain", short_help="Say what a load would do, and why.")
@model_argument
@call_options()
@mode_option("compile", "require", "off")
@vault_options
def explain(model: str, size: str | None, parts: Parts, dir: Path | None, as_json: bool, **asked: Any) -> None:
    """Say what a load of MODEL would do and, on a miss, which factors differ from the nearest entry.

    MODEL is a folder, a repository id, or `demo` for the pipeline that ships. The status is hit, partial (an entry
    some of whose parts run eagerly) or miss.

    \b
    Examples:
      pipevault explain demo
      pipevault explain ./my-model --size 768x512 --dtype bfloat16
      pipevault explain demo --json
    """
    from pipevault import PipelineCache

    sizes = [] if size is None else [size]
    [shape] = shapes_of(model, sizes, **take(asked, "batch_size", "num_frames", "guidance"))
    opening = take(asked, "dtype", "device")
    cache = PipelineCache(dir, **asked)
    pipe = open_pipeline(model, **opening)
    explanation = cache.explain(pipe, parts=parts, **shape)
    status, reason = explanation.status, explanation.reason
    found = explanation.parts
    if eager := [f"{name}: {part.reason}" for name, part in found.items() if part.status == "eager"]:
        status, reason = "partial", f"{reason}; {'; '.join(eager)}"
    load = _load_text(status, cache.settings.mode)
    if explanation.with_graphs and cache.settings.mode == "require":
        load = "would run the call to see whether the graphs suffice, and be an error if they do not"
    if status == "miss" and cache.settings.mode == "compile" and not _is_writable(cache.settings):
        load = "would be an error: the vault cannot be written, and on_unfrozen is 'compile'"
    if as_json:
        render.print_json(
            {
                "status": status,
                "reason": reason,
                "mode": cache.settings.mode,
                "load": load,
                "key": explanation.key.digest.hex,
                "vault": str(cache.settings.dir),
                "tier": explanation.tier,
                "problems": list(explanation.problems),
                "parts": {name: asdict(part) for name, part in found.items()},
                "nearest": None if explanation.nearest is None else explanation.nearest.hex,
                "differences": [asdict(difference) for difference in explanation.differences],
            }
        )
        return
    nearest = [] if explanation.nearest is None else [("nearest entry", explanation.nearest.short)]
    facts = render.facts(
        [
            ("status", status),
            ("reason", reason),
            ("load", load),
            ("key", explanation.key.digest.hex),
            ("vault", str(cache.settings.dir)),
            *([("tier", explanation.tier)] if explanation.tier not in ("", str(cache.settings.dir)) else []),
            *nearest,
            *(("problem", problem) for problem in explanation.problems),
        ]
    )
    rows = [
        (difference.factor, render.value_text(difference.ours), render.value_text(difference.theirs))
        for difference in explanation.differences
    ]
    render.show(facts, *([render.table(("FACTOR", "HERE", "IN THE VAULT"), rows)] if rows else []))


def _is_writable(settings: Settings) -> bool:
    """Tell whether a miss could be stored, or need not be."""
    if settings.unfrozen_policy != "compile":
        return True
    try:
        return Vault.of(settings).writable
    except NotAVaultError:  # it will be made
        return True


def _load_text(status: str, mode: str) -> str:
    if mode == "off":
        return "would leave the pipeline as it is: mode is off"
    text = IN_MODE["miss" if status == "miss" else "hit", mode]
    return f"{text}; some parts would run eagerly" if status == "partial" else text
