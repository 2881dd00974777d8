"""``pipevault verify``: check everything in the vault, and move what is bad to quarantine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipevault.cli import exits, render
from pipevault.cli.options import vault_options
from pipevault.cli.progress import byte_bar
from pipevault.cli.vaults import open_vault
from pipevault.errors import CorruptEntryError
from pipevault.settings import Settings

if TYPE_CHECKING:
    from pipevault.store.check.findings import Finding
    from pipevault.store.check.verify import VerifyReport


@click.command("verify", short_help="Check everything in the vault.")
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
    from pipevault.store.check.verify import verify as verify_vault
    from pipevault.store.trust.signing_keys import load_trusted

    settings = Settings.resolve(dir=dir)
    trusted = load_trusted(settings.trusted_keys)
    vault = open_vault(dir)
    code, word = exits.KINDS[CorruptEntryError]
    with byte_bar("verifying") as progress:
        report = verify_vault(vault, fix=fix, progress=progress, trusted=trusted, policy=settings.signature)
    if as_json:
        render.print_json({"vault": str(vault.root), "code": None if report.sound else word, **_document(report)})
    else:
        _tell(report, vault.root, fix)
    click.get_current_context().exit(exits.Exit.DONE if report.sound else code)


def _document(report: VerifyReport) -> dict[str, Any]:
    return {
        "sound": report.sound,
        "entries": report.entries,
        "broken": [key.hex for key in report.broken_keys],
        "artifacts": report.artifacts,
        "read_bytes": report.read_bytes,
        "bad": [_finding(finding) for finding in report.bad],
        "notable": [_finding(finding) for finding in report.notable],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "path": str(finding.path),
        "reason": finding.reason,
        "keys": [key.hex for key in finding.keys],
        "quarantined": [str(path) for path in finding.quarantined],
        "fixed": finding.mended,
    }


def _tell(report: VerifyReport, root: Path, fix: bool) -> None:
    for finding in report.bad:
        render.say(f"bad {finding.kind}: {_line(finding.reason)}")
        if finding.keys:
            entries = render.count_text(len(finding.keys), "entry", "entries")
            render.say(f"  {entries} cannot be used: {', '.join(key.short for key in finding.keys)}")
        for path in finding.quarantined:
            render.say(f"  moved to {path}")
        if fix and not finding.mended:
            render.say("  still there: fix it by hand")
    for finding in report.notable:
        render.say(f"{finding.kind}: {_line(finding.reason)}")
    entries = render.count_text(report.entries, "entry", "entries")
    artifacts = render.count_text(report.artifacts, "artifact", "artifacts")
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


def _line(text: str) -> str:
    return " ".join(text.split())
