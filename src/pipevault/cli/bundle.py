"""``pipevault export`` and ``import``: carry entries to another vault in one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipevault.cli import render
from pipevault.cli.options import path_option, vault_options
from pipevault.cli.progress import byte_bar
from pipevault.cli.vaults import open_vault
from pipevault.errors import SettingsError, UnknownKeyError
from pipevault.settings import Settings

if TYPE_CHECKING:
    from pipevault.digest import Digest
    from pipevault.store.vault import Vault


@click.command("export", short_help="Write entries to one file.")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
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
    from pipevault.store.bundle import export_bundle

    if bool(keys) is every:
        raise SettingsError("export takes the beginnings of KEYs, or --all alone.")
    vault = open_vault(dir)
    with byte_bar("exporting") as progress:
        report = export_bundle(vault, _keys(vault, keys), output, overwrite=overwrite, progress=progress)
    if as_json:
        render.print_json(
            {
                "bundle": str(output),
                "keys": [key.hex for key in report.keys],
                "artifacts": report.artifacts,
                "signatures": report.signatures,
                "size_bytes": report.size_bytes,
            }
        )
        return
    for key in report.keys:
        render.say(f"Exported {key.short}")
    artifacts = render.count_text(report.artifacts, "artifact", "artifacts")
    signatures = render.count_text(report.signatures, "signature", "signatures")
    entries = render.count_text(len(report.keys), "entry", "entries")
    render.note(f"{output}: {entries}, {artifacts}, {signatures}, {render.size_text(report.size_bytes)}")


@click.command("import", short_help="Take the entries of a bundle into the vault.")
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
    from pipevault.store.bundle import bundle_keys, import_bundle
    from pipevault.store.vault import Vault

    settings = Settings.resolve(dir=dir)
    keys = bundle_keys(bundle)  # before a vault is made for a file that is no bundle
    vault = Vault.of(settings, create=True)
    with byte_bar("importing") as progress:
        imported = set(import_bundle(vault, bundle, progress=progress))
    if settings.signature == "require" and (unsigned := _unsigned(settings, vault, keys)):
        number = render.count_text(len(unsigned), "entry has", "entries have")
        render.note(
            f"{number} no signature by a trusted key, and will not be loaded while signature is 'require': "
            f"pipevault sign {unsigned[0].short} --key FILE"
        )
    if as_json:
        document = {
            "vault": str(vault.root),
            "imported": [key.hex for key in keys if key in imported],
            "already_there": [key.hex for key in keys if key not in imported],
        }
        render.print_json(document)
        return
    for key in keys:
        render.say(f"Imported {key.short}" if key in imported else f"Kept {key.short}, which was there already")
    there = len(keys) - len(imported)
    kept = f"; {render.count_text(there, 'entry was', 'entries were')} there already" if there else ""
    render.note(f"Imported {render.count_text(len(imported), 'entry', 'entries')} into {vault.root}{kept}.")


def _unsigned(settings: Settings, vault: Vault, keys: Sequence[Digest]) -> list[Digest]:
    from pipevault.store.trust.signature import check_signature
    from pipevault.store.trust.signing_keys import load_trusted

    trusted = load_trusted(settings.trusted_keys)
    manifests = [manifest for key in keys if (manifest := vault.lookup(key)) is not None]
    return [
        manifest.key.digest
        for manifest in manifests
        if check_signature(vault.layout, manifest, policy="warn", trusted=trusted) is not None
    ]


def _keys(vault: Vault, prefixes: Sequence[str]) -> list[Digest]:
    """Return the keys that begin with ``prefixes``, or all if there are none."""
    from pipevault.store.places import iter_keys

    if prefixes:
        return [vault.find(prefix).key.digest for prefix in prefixes]
    keys = list(iter_keys(vault.layout))
    if not keys:
        raise UnknownKeyError(f"{vault.root} holds no entries, so there is nothing to export.", "")
    return keys
