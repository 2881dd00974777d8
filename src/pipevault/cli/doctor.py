"""``pipevault doctor``: one line for each thing that a freeze or a load needs, ok or with what to do."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import click

from pipevault import errors
from pipevault.cli import render
from pipevault.cli.exits import Exit
from pipevault.cli.options import command, vault_options
from pipevault.compat.nexfort import require_nexfort
from pipevault.compat.versions import OLDEST_TORCH, is_too_old, untried_text
from pipevault.files.atomic import is_shared
from pipevault.files.scratch import scratch_folder, scratch_places, scratch_root
from pipevault.settings import Settings
from pipevault.settings.user_folders import user_folder
from pipevault.store.places import iter_foreign
from pipevault.store.retention.removal import find_orphans
from pipevault.store.tiers import Tiers
from pipevault.store.trust.owners import check_ownership, check_root
from pipevault.store.trust.signing_keys import load_trusted
from pipevault.store.vault import BrokenManifest, Vault

FREE_SPACE_NEEDED_BYTES = 1_000_000_000
NEEDED_PACKAGES = ("diffusers", "transformers", "onediff", "onediffx")

_INSTALL_TORCH = f"Install torch {'.'.join(map(str, OLDEST_TORCH))} or newer."
_SHOWN_FILES = 3
_COMPILER_TIMEOUT_S = 60.0
_PROGRAM = "#include <vector>\nint main() { return std::vector<int>{}.size(); }\n"


@dataclass(frozen=True)
class Check:
    """``detail`` says what was found; ``remedy`` what to do about it, empty if nothing needs doing."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


@command("doctor", short_help="Check this machine and the vault.")
@vault_options
def doctor(dir: Path | None, as_json: bool) -> None:
    """Check Python, torch, the C++ compiler, the GPU, folders and the vault; exit code 1 if a check failed.

    \b
    Examples:
      pipevault doctor
      pipevault doctor --dir /srv/vault --json
    """
    checks = [
        Check("python", True, f"{platform.python_version()} ({sys.executable})"),
        check_torch(),
        *check_packages(),
        check_temporary_folder(),
        check_compiler(),
        check_gpu(),
        check_system_root(),
        *check_user_folders(),
        *check_settings(dir),
    ]
    healthy = all(check.ok for check in checks)
    if as_json:
        render.print_json({"ok": healthy, "code": None if healthy else "check-failed", "checks": checks})
    else:
        for check in checks:
            render.say(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}")
            if check.remedy:
                render.say(f"     -> {check.remedy}")
    click.get_current_context().exit(Exit.DONE if healthy else Exit.NO)


def check_torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of the build is missing
        return Check("torch", False, f"cannot be imported ({error})", _INSTALL_TORCH)
    version = str(torch.__version__)
    if not is_too_old(version):
        return Check("torch", True, version, untried_text(version) or "")
    try:
        require_nexfort()
    except errors.UnusableBackendError:
        return Check("torch", False, version, _INSTALL_TORCH)
    return Check("torch", True, f"{version}, for backend nexfort alone", f"For backend inductor: {_INSTALL_TORCH}")


def check_packages() -> Iterator[Check]:
    for name in NEEDED_PACKAGES:
        try:
            yield Check(name, True, version(name))
        except PackageNotFoundError:
            yield Check(name, False, "not installed", f"Run: pip install {name}")


def check_temporary_folder() -> Check:
    """Find the folder to compile in, and say why it is not one that is named for temporary files."""
    name, places = "temporary folder", scratch_places()
    try:
        root = scratch_root()
    except errors.TemporaryFolderError as error:
        remedy = f"{error} Where Python finds none either, torch needs TORCHINDUCTOR_CACHE_DIR to be imported at all."
        return Check(name, False, "none can be used to compile in", remedy)
    detail = f"{root}, {render.size_text(shutil.disk_usage(root).free)} free"
    if problems := [f"{place.folder} {place.problem}" for place in places if place.problem and place.is_named]:
        return Check(name, True, f"{detail}, for {'; '.join(problems)}", "Set TMPDIR to another folder.")
    return Check(name, True, detail)


def check_compiler() -> Check:
    """Compile and link a program of one line with the compiler that torch would use."""
    name = "c++ compiler"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(compiler)
    if found is None:
        remedy = "Install g++ or name a compiler in CXX; without one, only what others froze can be loaded."
        return Check(name, False, f"{compiler} was not found", remedy)
    try:
        with scratch_folder("doctor") as folder:
            source = folder / "try.cpp"
            source.write_text(_PROGRAM, "utf-8")
            command = [found, "-std=c++17", "-o", str(source.with_suffix(".out")), str(source)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILER_TIMEOUT_S)
    except errors.TemporaryFolderError:
        return Check(name, False, f"{found} was not tried", "Fix the temporary folder first.")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(name, False, f"{found} does not run ({error})", "Install g++ again.")
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[0]
        return Check(name, False, f"{found} cannot compile ({reason})", "Install g++ with libstdc++.")
    return Check(name, True, found)


def check_gpu() -> Check:
    try:
        import torch
    except (ImportError, OSError):
        return Check("gpu", True, "unknown without torch")
    if not torch.cuda.is_available():
        return Check("gpu", True, "none: graphs are frozen for the CPU")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("gpu", True, ", ".join(names))


def check_system_root() -> Check:
    is_read_only = bool(os.statvfs("/").f_flag & os.ST_RDONLY)
    return Check("root file system", True, "read-only" if is_read_only else "writable")


def check_user_folders() -> Iterator[Check]:
    """Find where this user's config file, listings and notes go; each can be done without."""
    for kind in ("config", "cache", "state"):
        name = f"{kind} folder"
        try:
            folder = user_folder(kind)
        except errors.NoHomeError as error:
            yield Check(name, True, "none, and nothing is kept there", str(error))
            continue
        if kind == "config" or os.access(_existing(folder), os.W_OK | os.X_OK):
            yield Check(name, True, str(folder))
        else:
            remedy = f"Set HOME or XDG_{kind.upper()}_HOME."
            yield Check(name, True, f"{folder} cannot be written, and nothing is kept there", remedy)


def check_settings(dir: Path | None) -> Iterator[Check]:
    try:
        settings = Settings.resolve(dir=dir)
    except errors.NoHomeError as error:
        yield Check("vault", False, "no folder is set for it", str(error))
        return
    yield from check_vault(settings)
    yield from check_tiers(settings)
    yield check_signatures(settings)


def check_vault(settings: Settings) -> Iterator[Check]:
    root = settings.dir
    try:
        is_made = root.exists() and not (root.is_dir() and not any(root.iterdir()))
        vault = Vault.of(settings) if is_made else None
    except (errors.VaultError, OSError) as error:
        yield Check("vault", False, f"{root} cannot be used", str(error))
        return
    place = _existing(root)
    if vault is not None:
        yield Check("vault", True, str(vault.root))
        for name, check in (
            ("permissions", _check_permissions),
            ("entries", _check_entries),
            ("orphans", _check_orphans),
            ("foreign files", _check_foreign),
        ):
            try:
                yield check(vault)
            except errors.PipevaultError as error:  # the others still run
                yield Check(name, False, "could not be checked", str(error))
    elif place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        yield Check("vault", True, f"{root} will be made at the first freeze")
    else:
        yield Check("vault", False, f"{root} cannot be made", f"Make {place} writable, or give another folder.")
    free_bytes = shutil.disk_usage(place).free
    needed = render.size_text(FREE_SPACE_NEEDED_BYTES)
    remedy = f"Free space on {place}: {needed} is a safe minimum for compiling."
    is_enough = free_bytes >= FREE_SPACE_NEEDED_BYTES
    yield Check("free space", is_enough, render.size_text(free_bytes), "" if is_enough else remedy)


def _existing(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _check_permissions(vault: Vault) -> Check:
    try:
        check_root(vault.root, trust=vault.trust)
        check_ownership(vault.layout.vault_file, root=vault.root, trust=vault.trust)
    except errors.UnsafeVaultError as error:
        return Check("permissions", False, "native code is not loaded from here", str(error))
    if vault.writable:
        whose = f"shared by the group {vault.root.stat().st_gid}" if is_shared(vault.root) else "by this user alone"
        return Check("permissions", True, f"writable, {whose}")
    if Settings.resolve(dir=vault.root).mode == "require":
        return Check("permissions", True, "read-only for this user, which mode require asks for")
    remedy = "Load in mode require, fix the permissions, or give another folder."
    return Check("permissions", False, "read-only for this user", remedy)


def _check_entries(vault: Vault) -> Check:
    entries = list(vault.manifests())
    broken = [entry for entry in entries if isinstance(entry, BrokenManifest)]
    if not broken:
        return Check("entries", True, f"{len(entries)}, every manifest intact")
    detail = f"{len(entries)}, {len(broken)} with a manifest that cannot be used: {broken[0].reason}"
    return Check("entries", False, detail, _removal(vault, *(entry.key.short for entry in broken[:_SHOWN_FILES])))


def _check_orphans(vault: Vault) -> Check:
    """Count the artifacts that no entry names, which do no harm but take space."""
    old, young = find_orphans(vault.layout)
    number = len(old.artifacts) + len(young.artifacts)
    if not number:
        return Check("orphans", True, "no artifact without an entry")
    size = render.size_text(old.size_bytes + young.size_bytes)
    detail = f"{render.count_text(number, 'artifact')}, {size}, without an entry"
    if old.artifacts:
        return Check("orphans", True, detail, _removal(vault, "--orphans"))
    return Check("orphans", True, f"{detail}, younger than an hour: a freeze may be about to name them")


def _removal(vault: Vault, *arguments: str) -> str:
    return f"Run: {shlex.join(['pipevault', 'rm', *arguments, '--dir', str(vault.root)])}"


def _check_foreign(vault: Vault) -> Check:
    foreign = list(islice(iter_foreign(vault.layout), _SHOWN_FILES + 1))
    if not foreign:
        return Check("foreign files", True, "none")
    shown = ", ".join(str(path) for path in foreign[:_SHOWN_FILES])
    more = " and more" if len(foreign) > _SHOWN_FILES else ""
    return Check("foreign files", True, f"{shown}{more}", "They are ignored. Move them away if they are not meant.")


def check_tiers(settings: Settings) -> Iterator[Check]:
    """Check each tier but the vault of ``settings.dir``, which has lines of its own."""
    tiers = Tiers(settings)
    for tier in tiers.order:
        if tier == tiers.own_tier:
            continue
        name = f"tier {tier.dir}"
        try:
            access = "writable" if tiers.is_writable(tier) else "read-only"
        except errors.VaultError as error:
            yield Check(name, False, "every load leaves it out", str(error))
            continue
        copied = "hits are copied" if tier.copy else "hits are not copied"
        yield Check(name, True, f"{access}, {copied}, signature {tiers.policy(tier)}")


def check_signatures(settings: Settings) -> Check:
    try:
        trusted = load_trusted(settings.trusted_keys)
    except errors.PipevaultError as error:
        return Check("signatures", False, "trusted_keys cannot be used", str(error))
    policies = {settings.signature, *(tier.signature for tier in settings.tiers)}
    if "require" in policies and not trusted:
        remedy = "Name public keys in trusted_keys (PIPEVAULT_TRUSTED_KEYS)."
        return Check("signatures", False, "required, and no key is trusted: no entry can be loaded", remedy)
    return Check("signatures", True, f"{settings.signature}, {len(trusted)} trusted keys")
