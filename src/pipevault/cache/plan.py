"""A plan: which graphs a call of a pipeline needs. It answers before anything runs, and a hit never needs it.

The manifest of a plan has no artifacts. ``parts`` has for each part ``{"status": "frozen", "reason": "", "graphs":
["<key>", …]}``, and ``needs`` the keys of all its graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipevault.cache.keys import made_here
from pipevault.cache.outcome import PartOutcome
from pipevault.cache.rehearsal import Rehearsal
from pipevault.cache.search import Store
from pipevault.digest import Digest
from pipevault.graphs.state import PartState
from pipevault.graphs.table import UNUSABLE, Slot
from pipevault.key import Key
from pipevault.store.manifest import Manifest, now_utc


def make_plan(key: Key, rehearsal: Rehearsal, seconds: float) -> Manifest:
    """Return the plan of a rehearsed call."""
    parts = {
        name: {
            "status": part.status,
            "reason": part.reason,
            "graphs": list(rehearsal.graphs.get(name, ())),
            "left_eager": name in rehearsal.eager,
            **({"regions": part.regions} if part.regions else {}),
        }
        for name, part in rehearsal.parts.items()
    }
    needs = sorted({Digest(graph) for graphs in rehearsal.graphs.values() for graph in graphs})
    info: dict[str, Any] = {"compile_s": round(seconds, 3), **made_here()}
    if rehearsal.check is not None:
        info["check"] = {"distance": rehearsal.check.distance, "tolerance": rehearsal.check.tolerance}
    return Manifest(key, parts, (), info, now_utc(), needs=tuple(needs))


def plan_outcomes(manifest: Manifest) -> dict[str, PartOutcome]:
    """Return what a plan says of each part."""
    return {
        name: PartOutcome(part["status"], part["reason"], len(part["graphs"]), part.get("regions", ""))
        for name, part in sorted(manifest.parts.items())
    }


def open_graphs(manifest: Manifest, states: Mapping[str, PartState], store: Store) -> str:
    """Open the graphs of a plan for the parts as they are now; return which one is missing, or nothing. One for weights
    of another dtype, to which the pipeline casts a part for a call, is opened then, and must exist all the same.
    """
    for name, part in manifest.parts.items():
        renewed: dict[str, str] = {}
        for state in (state for state in states.values() if state.part == name):
            if lacking := _open_part(name, part["graphs"], state, store, renewed):
                return lacking
    return ""


def _open_part(name: str, graphs: Sequence[str], state: PartState, store: Store, renewed: dict[str, str]) -> str:
    """Open the ``graphs`` of a part, or of one of its blocks. ``renewed`` has what was found for the others."""
    table = state.table
    table.read_shelf()
    slots: dict[str, Slot] = {slot.kept.key: slot for slot in table}
    suffix = table.shelf.identity[:16] if table.shelf else ""
    for graph in graphs:
        slot = slots.get(graph)
        if slot is None and graph.endswith(suffix):
            return _lacking(graph, name, "it is gone")
        if slot is not None and slot.graph is None:
            try:
                state.open(slot)
            except UNUSABLE as error:
                table.remove(slot)
                return str(error)
            renewed[graph] = ""
            continue
        if graph not in renewed:
            renewed[graph] = store.renew(Digest(graph))
        if what := renewed[graph]:
            if slot is not None and store.settings.mode == "compile":
                table.remove(slot)  # so that it is frozen and stored again
            return _lacking(graph, name, what)
    return ""


def _lacking(graph: str, part: str, what: str) -> str:
    return f"the graph {graph[:12]} of {part}, which the plan needs, cannot be used: {what}"
