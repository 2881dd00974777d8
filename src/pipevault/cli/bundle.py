"""``pipevault export`` and ``import``: carry entries to another vault in one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from pipevault.cli import render
from pipevault.cli.options import command, keys_argument, keys_in, open_vault, path_option, vault_options
from pipevault.cli.progress import byte_bar
from pipevault.digest import Digest
from pipevault.errors import SettingsError, UnknownKeyError
from pipevault.settings import Settings
from pipevault.store.bundle import bundle_keys, export_bundle, import_to
from pipevault.store.trust.signature import check_signature
from pipevault.store.trust.signing_keys import load_trusted
from pipevault.store.vault import Vault


@command("export", short_help="Write entries to one file.")
@keys_argument
@click.option("--all", "every", is_flag=True, help="Every entry of the vault.")
@path_option("-o", "--output", metavar="FILE", required=True, help="The bundle to write.")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@vault_options
def export(keys: tuple[str, ...], every: bool, output: Path, overwrite: bool, dir: Path | None, as_json: bool) -> None:
    """Write the entries whose keys begin with KEY to a bundle: one file with their artifacts and signatures.

    With a plan go the graphs that it needs. The same entries make the same bytes. A bundle is a zip file that is not
    compressed. A damaged entry is an error, and so is a plan whose graphs are not all there; nothing is written then.

    \b
    Examples:
      pipevault export 3f9a2c -o digits.zip
      pipevault export 3f9a2c 77b01e -o digits.zip --overwrite
      pipevault export --all -o vault.zip --dir /srv/vault
    """
    if bool(keys) is every:
        raise SettingsError("export takes the beginnings of KEYs, or --all alone.")
    vault = open_vault(dir)
    wanted = keys_in(vault, keys)
    if not wanted:
        raise UnknownKeyError(f"{vault.root} holds no entries, so there is nothing to export.", "")
    with byte_bar("exporting") as progress:
        report = export_bundle(vault, wanted, output, overwrite=overwrite, progress=progress)
    if as_json:
        render.print_json({"bundle": output, **vars(report)})
        return
    for key in report.keys:
        render.say(f"Exported {key.short}")
    artifacts = render.count_text(report.artifacts, "artifact")
    signatures = render.count_text(report.signatures, "signature")
    entries = render.count_text(len(report.keys), "entry", "entries")
    render.note(f"{output}: {entries}, {artifacts}, {signatures}, {render.size_text(report.size_bytes)}")


@command("import", short_help="Take the entries of a bundle into the vault.")
@click.argument("bundle", metavar="FILE", type=click.Path(path_type=Path))
@vault_options
def import_(bundle: Path, dir: Path | None, as_json: bool) -> None:
    """Take the entries of the bundle FILE into the vault, which is made if there is none.

    The whole file is verified before anything becomes visible. Entries that the vault holds already stay as they are.

    \b
    Examples:
      pipevault import digits.zip
      pipevault import digits.zip --dir /srv/vault --json
    """
    settings = Settings.resolve(dir=dir)
    keys = bundle_keys(bundle)  # before a vault is made for a file that is no bundle
    with byte_bar("importing") as progress:
        vault, imported_keys = import_to(settings, bundle, progress=progress)
    new = set(imported_keys)
    if settings.signature == "require":
        _tell_unsigned(settings, vault, keys)
    kept = [key for key in keys if key not in new]
    if as_json:
        imported = [key for key in keys if key in new]
        render.print_json({"vault": vault.root, "imported": imported, "already_there": kept})
        return
    for key in keys:
        render.say(f"Kept {key.short}, which was there already" if key in kept else f"Imported {key.short}")
    there = f"; {render.count_text(len(kept), 'entry was', 'entries were')} there already" if kept else ""
    render.note(f"Imported {render.count_text(len(new), 'entry', 'entries')} into {vault.root}{there}.")


def _tell_unsigned(settings: Settings, vault: Vault, keys: Sequence[Digest]) -> None:
    """Say how many of the entries no load will accept."""
    trusted = load_trusted(settings.trusted_keys)
    entries = filter(None, map(vault.lookup, keys))
    unsigned = [one for one in entries if check_signature(vault.layout, one, policy="warn", trusted=trusted)]
    if unsigned:
        number = render.count_text(len(unsigned), "entry has", "entries have")
        render.note(
            f"{number} no signature by a trusted key, and will not be loaded while signature is 'require': "
            f"pipevault sign {unsigned[0].key.digest.short} --key FILE"
        )
