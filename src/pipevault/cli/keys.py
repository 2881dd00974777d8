"""``pipevault keygen`` and ``pipevault sign``: keys, and signatures over entries, which ``show`` shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from pipevault.cli import exits, render
from pipevault.cli.options import command, json_option, keys_argument, keys_in, open_vault, path_option, vault_options
from pipevault.digest import Digest
from pipevault.errors import PipevaultError, SettingsError, UnknownKeyError
from pipevault.store.needs import needed_by, needs_in
from pipevault.store.trust.signing_keys import PUBLIC_SUFFIX, PrivateKey, read_private_key, write_key_pair
from pipevault.store.vault import Vault


@command("keygen", short_help="Make a pair of keys for signing entries.")
@path_option(
    "--output",
    "-o",
    metavar="KEYFILE",
    required=True,
    help="The private key; the public one gets this name with .pub after it. Neither is overwritten.",
)
@click.option("--comment", metavar="TEXT", default="", help="Words after the public key, such as whose it is.")
@json_option
def keygen(output: Path, comment: str, as_json: bool) -> None:
    """Make a pair of Ed25519 keys. The private one, for this user alone, signs; the public one goes to trusted_keys.

    Prints the public key, which is not secret. KEYFILE has no password: whoever reads it can sign.

    \b
    Examples:
      pipevault keygen -o ~/.config/pipevault/signing.key --comment "build machine"
      pipevault keygen -o signing.key --json
    """
    public = write_key_pair(output, comment=comment)
    public_file = output.with_name(output.name + PUBLIC_SUFFIX)
    if as_json:
        files = {"private_file": output, "public_file": public_file}
        render.print_json({"id": public.id, "public_key": public.text, **files})
        return
    render.say(public.text)
    render.note(f"Key {public.id}: {output} signs, keep it secret; {public_file} is what others put into trusted_keys.")


@command("sign", short_help="Sign entries.")
@keys_argument
@click.option("--all", "all_entries", is_flag=True, help="Sign every entry of the vault.")
@path_option("--key", "key_file", metavar="KEYFILE", required=True, help="The private key.")
@vault_options
def sign(keys: tuple[str, ...], all_entries: bool, key_file: Path, dir: Path | None, as_json: bool) -> None:
    """Sign the entries whose keys begin with KEY: say that their code is what it should be. With a plan the graphs that
    it needs are signed.

    Each is verified first, artifacts and all; one that fails is not signed and does not stop the others. The exit code
    is that of the first error.

    \b
    Examples:
      pipevault sign 3f9a2c --key signing.key
      pipevault sign --all --key signing.key --dir /srv/vault
    """
    if bool(keys) is all_entries:
        raise SettingsError("sign needs entries: give the beginning of one KEY or more, or --all alone.")
    private = read_private_key(key_file)
    vault = open_vault(dir)
    wanted = keys_in(vault, keys)
    if not all_entries:
        wanted = _with_needed(vault, wanted)
    results = [(key, *_sign(vault, key, private)) for key in wanted]
    code, word = exits.first_of(exits.kind_of(error) for _, _, error in results if error)
    if as_json:
        documents = [
            {"key": key, "state": state, **(exits.error_document(error) if error else {"code": None, "message": ""})}
            for key, state, error in results
        ]
        signer = {"public_key": private.public.text, "id": private.public.id}
        render.print_json({"vault": vault.root, **signer, "code": word, "entries": documents})
    else:
        for key, state, error in results:
            render.say(f"{key.short} {state}")
            if error:
                render.note(f"{key.short}: {exits.text_of(error)}")
        signed = sum(error is None for _, _, error in results)
        of = "" if signed == len(results) else f" of {len(results)}"
        render.note(f"{signed}{of} {'entry has' if signed == 1 and not of else 'entries have'} a signature by the key")
        render.note(private.public.text)
    click.get_current_context().exit(code)


def _with_needed(vault: Vault, keys: Sequence[Digest]) -> list[Digest]:
    """Return ``keys``, then what they need as far as it is there; a note names what is not."""
    needed = needed_by(keys, needs_in(vault.layout))
    there = [key for key in sorted(needed) if vault.layout.manifest_file(key).exists()]
    for key in sorted(needed.keys() - set(there)):
        render.note(f"{needed[key].short} needs {key.short}, which is not in the vault and so is not signed.")
    return [*keys, *there]


def _sign(vault: Vault, key: Digest, private: PrivateKey) -> tuple[str, PipevaultError | None]:
    """Return ``signed``, ``signed already`` or ``failed``, with the error."""
    try:
        manifest = vault.lookup(key)
        if manifest is None:
            raise UnknownKeyError(f"The entry {key.short} was removed meanwhile.", key.hex)
        return "signed" if vault.sign(manifest, private) else "signed already", None
    except PipevaultError as error:
        return "failed", error
