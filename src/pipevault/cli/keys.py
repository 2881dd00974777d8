"""``pipevault keygen`` and ``pipevault sign``: keys, and signatures over entries, which ``show`` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipevault.cli import exits, render
from pipevault.cli.options import json_option, path_option, vault_options
from pipevault.digest import Digest
from pipevault.errors import PipevaultError, SettingsError, UnknownKeyError
from pipevault.settings import Settings

if TYPE_CHECKING:
    from pipevault.store.manifest import Manifest
    from pipevault.store.trust.signature import SignatureState
    from pipevault.store.trust.signing_keys import PrivateKey
    from pipevault.store.vault import Vault

STATE_TEXTS = {"good": "good, by a trusted key", "unknown key": "by a key that is not in trusted_keys"}


@dataclass(frozen=True)
class SignResult:
    """The result of one entry; ``state``: ``signed``, ``signed already``, ``failed``."""

    key: Digest
    state: str
    error: PipevaultError | None = None


@click.command("keygen", short_help="Make a pair of keys for signing entries.")
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
    from pipevault.store.trust.signing_keys import PUBLIC_SUFFIX, write_key_pair

    public = write_key_pair(output, comment=comment)
    public_file = output.with_name(output.name + PUBLIC_SUFFIX)
    if as_json:
        render.print_json(
            {
                "id": public.id,
                "public_key": public.text,
                "private_file": str(output),
                "public_file": str(public_file),
            }
        )
        return
    render.say(public.text)
    render.note(f"Key {public.id}: {output} signs, keep it secret; {public_file} is what others put into trusted_keys.")


@click.command("sign", short_help="Sign entries.")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
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
    from pipevault.store.places import iter_keys
    from pipevault.store.trust.signing_keys import read_private_key
    from pipevault.store.vault import Vault

    private = read_private_key(key_file)
    settings = Settings.resolve(dir=dir)
    vault = Vault.of(settings)
    if all_entries:
        wanted = list(iter_keys(vault.layout))
    else:
        wanted = _with_needed(vault, list(dict.fromkeys(vault.find(key).key.digest for key in keys)))
    results = [_sign(vault, key, private) for key in wanted]
    _report(vault, results, private, as_json=as_json)


def entry_signatures(vault: Vault, manifest: Manifest, settings: Settings) -> tuple[SignatureState, ...]:
    """Return the signatures of an entry and what they are worth with the trusted keys of ``settings``."""
    from pipevault.store.trust.signature import signature_states
    from pipevault.store.trust.signing_keys import load_trusted

    return signature_states(vault.layout, manifest, load_trusted(settings.trusted_keys))


def signatures_document(states: Sequence[SignatureState]) -> list[dict[str, str]]:
    return [
        {"public_key": state.public_key_id, "state": state.state, "reason": state.reason, "path": str(state.path)}
        for state in states
    ]


def signatures_text(states: Sequence[SignatureState]) -> str:
    texts = (f"{state.public_key_id} {STATE_TEXTS.get(state.state, f'bad: {state.reason}')}" for state in states)
    return "; ".join(texts) or "none"


def _with_needed(vault: Vault, keys: Sequence[Digest]) -> list[Digest]:
    """Return ``keys``, then what they need as far as it is there; a note names what is not."""
    from pipevault.store.needs import needed_by, needs_in

    needed = needed_by(keys, needs_in(vault.layout))
    there = [key for key in sorted(needed) if vault.layout.manifest_file(key).exists()]
    for key in sorted(needed.keys() - set(there)):
        render.note(f"{needed[key].short} needs {key.short}, which is not in the vault and so is not signed.")
    return [*keys, *there]


def _sign(vault: Vault, key: Digest, private: PrivateKey) -> SignResult:
    try:
        manifest = vault.lookup(key)
        if manifest is None:
            raise UnknownKeyError(f"The entry {key.short} was removed meanwhile.", key.hex)
        return SignResult(key, "signed" if vault.sign(manifest, private) else "signed already")
    except PipevaultError as error:
        return SignResult(key, "failed", error)


def _report(vault: Vault, results: Sequence[SignResult], private: PrivateKey, *, as_json: bool) -> None:
    code, word = exits.first_of(result.error for result in results)
    if as_json:
        render.print_json(
            {
                "vault": str(vault.root),
                "public_key": private.public.text,
                "id": private.public.id,
                "code": word,
                "entries": [_document(result) for result in results],
            }
        )
    else:
        for result in results:
            render.say(f"{result.key.short} {result.state}")
            if result.error:
                render.note(f"{result.key.short}: {exits.code_of(result.error)}: {exits.message_of(result.error)}")
        signed = sum(result.error is None for result in results)
        of = "" if signed == len(results) else f" of {len(results)}"
        render.note(f"{signed}{of} {'entry has' if signed == 1 and not of else 'entries have'} a signature by the key")
        render.note(private.public.text)
    click.get_current_context().exit(code)


def _document(result: SignResult) -> dict[str, Any]:
    failure = {"code": None, "message": ""} if result.error is None else exits.error_document(result.error)
    return {"key": result.key.hex, "state": result.state, **failure}
