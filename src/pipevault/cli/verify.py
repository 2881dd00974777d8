"""``pipevault verify``: check everything in the vault, and move what is bad to quarantine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipevault.cli import exits, render
from pipevault.cli.options import command, vault_options
from pipevault.cli.progress import byte_bar
from pipevault.errors import CorruptEntryError
from pipevault.settings import Settings
from pipevault.store.check import Finding, VerifyReport
from pipevault.store.check import verify as verify_vault
from pipevault.store.trust.signing_keys import load_trusted
from pipevault.store.vault import Vault


@command("verify", short_help="Check everything in the vault.")
@click.option("--fix", is_flag=True, help="Move what is bad to quarantine, with the reason.")
@vault_options
def verify(fix: bool, dir: Path | None, as_json: bool) -> None:
    """Check every file of the vault: manifests, artifacts, owners and permissions, pins, signatures.

    Exit code 0 if nothing is bad, else 3; with --fix, 0 if all that was bad is out of the way. Entries that were moved
    are frozen again by the next load. What is only in the way (artifacts that no entry names, foreign files, folders of
    dead processes) is listed, and changes neither the exit code nor what --fix does.

    \b
    Examples:
      pipevault verify
      pipevault verify --fix
      pipevault verify --dir /srv/vault --json
    """
    settings = Settings.resolve(dir=dir)
    trusted = load_trusted(settings.trusted_keys)
    vault = Vault.of(settings)
    with byte_bar("verifying") as progress:
        report = verify_vault(vault, fix=fix, progress=progress, trusted=trusted, policy=settings.signature)
    failure: exits.Failure = (exits.Exit.DONE, None) if report.sound else exits.KINDS[CorruptEntryError]
    if as_json:
        render.print_json(
            {
                "vault": vault.root,
                "code": failure[1],
                "sound": report.sound,
                "entries": report.entries,
                "broken": report.broken_keys,
                "artifacts": report.artifacts,
                "read_bytes": report.read_bytes,
                "bad": [_document(finding) for finding in report.bad],
                "notable": [_document(finding) for finding in report.notable],
            }
        )
    else:
        _tell(report, vault.root, fix)
    click.get_current_context().exit(failure[0])


def _document(finding: Finding) -> dict[str, Any]:
    named = {name: getattr(finding, name) for name in ("kind", "path", "reason", "keys", "quarantined")}
    return {**named, "fixed": finding.mended}


def _tell(report: VerifyReport, root: Path, fix: bool) -> None:
    for finding in report.bad:
        render.say(f"bad {finding.kind}: {' '.join(finding.reason.split())}")
        if finding.keys:
            entries = render.count_text(len(finding.keys), "entry", "entries")
            render.say(f"  {entries} cannot be used: {', '.join(key.short for key in finding.keys)}")
        for path in finding.quarantined:
            render.say(f"  moved to {path}")
        if fix and not finding.mended:
            render.say("  still there: fix it by hand")
    for finding in report.notable:
        render.say(f"{finding.kind}: {' '.join(finding.reason.split())}")
    entries = render.count_text(report.entries, "entry", "entries")
    artifacts = render.count_text(report.artifacts, "artifact")
    render.note(f"{root}: {entries}, {artifacts}, {render.size_text(report.read_bytes)} read. {_verdict(report, fix)}")


def _verdict(report: VerifyReport, fix: bool) -> str:
    if not report.bad:
        return "Nothing is wrong."
    found = f"{render.count_text(len(report.bad), 'thing is', 'things are')} bad"
    if not fix:
        movable = any(finding.movable for finding in report.bad)
        return f"{found}. Move it out of the way: pipevault verify --fix" if movable else f"{found}."
    left = sum(not finding.mended for finding in report.bad)
    return f"{found}, {render.count_text(left, 'is', 'are')} left." if left else f"{found}, all out of the way now."
