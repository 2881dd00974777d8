"""``pipevault explain``: what a load of a pipeline would do, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipevault.cli import render
from pipevault.cli.options import Parts, call_options, command, mode_option, model_argument, take, vault_options
from pipevault.cli.pipelines import shape_of
from pipevault.errors import NotAVaultError
from pipevault.opening import open_pipeline
from pipevault.settings import Settings
from pipevault.store.vault import Vault


@command("explain", short_help="Say what a load would do, and why.")
@model_argument
@call_options()
@mode_option("compile", "require", "off")
@vault_options
def explain(model: str, parts: Parts, dir: Path | None, as_json: bool, **asked: Any) -> None:
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

    shape = shape_of(model, **take(asked, "size", "batch_size", "num_frames", "guidance"))
    opening = take(asked, "dtype", "device")
    cache = PipelineCache(dir, **asked)
    pipe = open_pipeline(model, **opening)
    explanation = cache.explain(pipe, parts=parts, **shape)
    status, reason = explanation.status, explanation.reason
    if eager := [f"{name}: {part.reason}" for name, part in explanation.parts.items() if part.status == "eager"]:
        status, reason = "partial", f"{reason}; {'; '.join(eager)}"
    vault = cache.settings.dir
    answer = {
        "status": status,
        "reason": reason,
        "mode": cache.settings.mode,
        "load": _load_text(status, cache.settings, with_graphs=bool(explanation.with_graphs)),
        "key": explanation.key.digest,
        "vault": vault,
        "tier": explanation.tier,
    }
    if as_json:
        render.print_json(
            {
                **answer,
                "problems": explanation.problems,
                "parts": explanation.parts,
                "nearest": explanation.nearest,
                "differences": explanation.differences,
            }
        )
        return
    hidden = {"mode"} if explanation.tier not in ("", str(vault)) else {"mode", "tier"}
    facts = [(name, str(value)) for name, value in answer.items() if name not in hidden]
    if explanation.nearest is not None:
        facts.append(("nearest entry", explanation.nearest.short))
    facts += [("problem", problem) for problem in explanation.problems]
    rows = [
        (difference.factor, render.value_text(difference.ours), render.value_text(difference.theirs))
        for difference in explanation.differences
    ]
    render.show(render.facts(facts), render.table(("FACTOR", "HERE", "IN THE VAULT"), rows))


def _load_text(status: str, settings: Settings, *, with_graphs: bool) -> str:
    """Return what a load would do, by what is in the vault and by mode."""
    if settings.mode == "off":
        return "would leave the pipeline as it is: mode is off"
    if settings.mode == "require" and with_graphs:
        return "would run the call to see whether the graphs suffice, and be an error if they do not"
    if status != "miss":
        return f"would load the entry{'; some parts would run eagerly' if status == 'partial' else ''}"
    if settings.mode == "require":
        return "would be an error: mode is require"
    if not _is_writable(settings):
        return "would be an error: the vault cannot be written, and on_unfrozen is 'compile'"
    return "would compile and store an entry"


def _is_writable(settings: Settings) -> bool:
    """Tell whether a miss could be stored, or need not be."""
    if settings.unfrozen_policy != "compile":
        return True
    try:
        return Vault.of(settings).writable
    except NotAVaultError:  # it will be made
        return True
