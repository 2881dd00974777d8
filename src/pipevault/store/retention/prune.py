"""Keeping a vault small: carrying a plan out, and saying what really happened.

Order of removal: quarantined files, manifests, then artifacts, then what belonged to the entries (signatures, notes of
uses). A process that dies in between leaves whole entries or none, and what no manifest names, which the next pruning
removes.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipevault.digest import Digest
from pipevault.errors import PinError, VaultError
from pipevault.store.inventory import find_files
from pipevault.store.layout import Layout
from pipevault.store.retention.holds import find_holds
from pipevault.store.retention.leftovers import Leftover, sweep
from pipevault.store.retention.prune_plan import Going, PrunePlan, Staying, plan_prune, stale_quarantined
from pipevault.store.retention.removal import (
    remove_artifacts,
    remove_belongings,
    remove_empty_shelves,
    remove_file,
    take_aside,
)
from pipevault.store.retention.usage import last_use_s, set_last_use
from pipevault.store.stats.event_totals import compact

if TYPE_CHECKING:
    from pipevault.store.vault import Vault

__all__ = ["Going", "PrunePlan", "PruneReport", "Staying", "carry_out", "enforce_max_size", "plan_prune"]


@dataclass(frozen=True)
class PruneReport:
    """The files that this call removed, in bytes; what another process removed first is not counted."""

    entries: tuple[Digest, ...] = ()
    artifacts: tuple[Digest, ...] = ()
    """Orphans among them."""
    quarantined: tuple[Path, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    """Files of dead processes in ``tmp/``, ``locks/``, ``leases/`` and elsewhere; not part of the vault's size."""
    staying: tuple[Staying, ...] = ()
    """Planned to go, but used, pinned, loaded or frozen again since."""
    freed_bytes: int = 0
    left_bytes: int = 0
    """Size of the vault now, counted from the plan's."""
    problems: tuple[str, ...] = ()


def vault_size_bytes(layout: Layout) -> int:
    """Return the bytes of manifests, artifacts, signatures and quarantined files; no file is opened.

    A file that vanishes meanwhile, or a folder that cannot be read, counts as empty.
    """
    folders = (layout.entries_dir, layout.artifacts_dir, layout.signatures_dir, layout.quarantine_dir)
    return sum(_folder_size_bytes(os.fspath(folder)) for folder in folders)


def carry_out(vault: Vault, plan: PrunePlan) -> PruneReport:
    """Do what was planned, but leave entries that were used, pinned, loaded or frozen again since; remove what dead
    processes left, too.

    :class:`VaultNotWritableError` if a file cannot be removed; what was removed stays removed. :class:`PinError`: a pin
    cannot be read.
    """
    vault.require_writable("Prune it as its owner.")
    layout = vault.layout
    leftovers = sweep(layout)
    quarantined = {path: size for path in plan.quarantined if (size := remove_file(path)) is not None}
    removed, staying = _remove_entries(layout, plan)
    artifacts, artifact_bytes, _ = remove_artifacts(layout, (*plan.artifacts, *plan.orphans), after=removed)
    remove_empty_shelves(layout)
    problems = list(plan.problems)
    belongings_bytes = 0
    for key in (*removed, *plan.strays):
        try:
            belongings_bytes += remove_belongings(layout, key)
        except VaultError as error:  # what is left of a removed entry harms nobody
            problems.append(str(error))
    for key in plan.ahead:
        if key not in removed:
            set_last_use(layout, key, plan.now_s)
    try:
        compact(layout)  # last, for it needs room
    except VaultError as error:
        problems.append(str(error))
    freed_bytes = sum(quarantined.values()) + sum(removed.values()) + artifact_bytes + belongings_bytes
    return PruneReport(
        entries=tuple(removed),
        artifacts=tuple(artifacts),
        quarantined=tuple(quarantined),
        leftovers=tuple(leftovers),
        staying=staying,
        freed_bytes=freed_bytes,
        left_bytes=plan.size_bytes - freed_bytes,
        problems=tuple(problems),
    )


def enforce_max_size(vault: Vault, key: Digest, *, max_size: int | None) -> PruneReport | None:
    """After ``key`` was published: remove the least recently used others if the vault is above ``max_size`` bytes.

    ``None`` if it is not, which takes one look at each file's size; what quarantine may not hold is removed first.
    Never raises: what went wrong stands in ``problems``, and so does why the limit is not reached.
    """
    if max_size is None or not vault.writable:
        return None
    try:
        for path in stale_quarantined(find_files(vault.layout.quarantine_dir), time.time()):
            remove_file(path)
        if vault_size_bytes(vault.layout) <= max_size:
            return None
        plan = plan_prune(vault, max_size=max_size, keep=(key,))
        report = carry_out(vault, plan)
    except (VaultError, PinError, OSError, ValueError, MemoryError) as error:
        return PruneReport(problems=(f"The vault could not be kept within its max_size of {max_size} bytes: {error}",))
    if report.left_bytes <= max_size:
        return report
    reasons = "; ".join((*plan.because, *(f"{entry.key.short} stays ({entry.reason})" for entry in report.staying)))
    problem = f"The vault has {report.left_bytes} bytes, more than its max_size of {max_size}: {reasons}."
    return replace(report, problems=(*report.problems, problem))


def _remove_entries(layout: Layout, plan: PrunePlan) -> tuple[dict[Digest, int], tuple[Staying, ...]]:
    """Remove the manifests that may still go; return the bytes of each, and what stays."""
    watch = _Watch(layout)
    removed: dict[Digest, int] = {}
    staying: list[Staying] = []
    for going in plan.entries:
        if reason := watch.reason_to_stay(going):
            staying.append(Staying(going.key, reason))
        elif (aside := take_aside(layout, going.key)) is not None:
            # Whoever leased or pinned it before it was taken aside is seen now; whoever does so later finds it gone.
            try:
                reason = watch.reason_to_stay(going)
            except BaseException:  # whatever it was goes on, such as a pin that cannot be read; the entry stays
                aside.put_back()
                raise
            if reason:
                aside.put_back()
                staying.append(Staying(going.key, reason))
            else:
                removed[going.key] = aside.remove()
    return removed, tuple(staying)


class _Watch:
    """Notices pins and leases that appear while entries are being removed."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._seen: object = None
        self._reasons: dict[Digest, str] = {}

    def reason_to_stay(self, going: Going) -> str:
        """Say why the entry must not go after all; empty if it may."""
        layout, key = self._layout, going.key
        if (seen := self._look()) != self._seen:
            self._reasons = {held: hold.reason for held, hold in find_holds(layout).items()}
            self._seen = seen
        if reason := self._reasons.get(key):
            return reason
        if last_use_s(layout, key) != going.used_s:
            return "used since the plan was made"
        try:
            unchanged = layout.manifest_file(key).stat().st_mtime_ns == going.modified_ns
        except OSError:  # gone, or the removal will say why not
            return ""
        return "" if unchanged else "frozen again since the plan was made"

    def _look(self) -> object:
        return [
            [(file.name, status.st_ino, status.st_mtime_ns) for file, status in _statuses(os.fspath(folder))]
            for folder in (self._layout.pins_dir, self._layout.leases_dir)
        ]


def _statuses(folder: str) -> list[tuple[os.DirEntry[str], os.stat_result]]:
    """List what stands in ``folder``, sorted by name; nothing if it is absent or cannot be read."""
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                found.append((entry, entry.stat(follow_symlinks=False)))
    return sorted(found, key=lambda pair: pair[0].name)


def _folder_size_bytes(folder: str) -> int:
    return sum(
        _folder_size_bytes(entry.path) if entry.is_dir(follow_symlinks=False) else status.st_size
        for entry, status in _statuses(folder)
    )
