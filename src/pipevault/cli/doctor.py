"""``pipevault doctor``: one line for each thing that a freeze or a load needs, ok or with what to do."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import click

from pipevault.cli import render
from pipevault.cli.exits import Exit
from pipevault.cli.options import vault_options
from pipevault.compat.nexfort import require_nexfort
from pipevault.compat.versions import OLDEST_TORCH, is_too_old, untried_text
from pipevault.errors import (
    NoHomeError,
    PipevaultError,
    TemporaryFolderError,
    UnsafeVaultError,
    UnusableBackendError,
    VaultError,
)
from pipevault.files.atomic import is_shared
from pipevault.files.scratch import scratch_folder, scratch_places, scratch_root
from pipevault.settings import Settings
from pipevault.settings.user_folders import user_folder
from pipevault.store.retention.removal import find_orphans
from pipevault.store.trust.owners import check_ownership, check_root
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


def _ok(name: str, detail: str, remedy: str = "") -> Check:
    return Check(name, True, detail, remedy)


def _fail(name: str, detail: str, remedy: str) -> Check:
    return Check(name, False, detail, remedy)


@click.command("doctor", short_help="Check this machine and the vault.")
@vault_options
def doctor(dir: Path | None, as_json: bool) -> None:
    """Check Python, torch, the C++ compiler, the GPU, folders and the vault; exit code 1 if a check failed.

    \b
    Examples:
      pipevault doctor
      pipevault doctor --dir /srv/vault --json
    """
    checks = [
        check_python(),
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
    code = None if healthy else "check-failed"
    if as_json:
        render.print_json({"ok": healthy, "code": code, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            render.say(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}")
            if check.remedy:
                render.say(f"     -> {check.remedy}")
    click.get_current_context().exit(Exit.DONE if healthy else Exit.NO)


def check_settings(dir: Path | None) -> Iterator[Check]:
    """Check the vault that the settings name, its tiers and the keys that they trust."""
    try:
        settings = Settings.resolve(dir=dir)
    except NoHomeError as error:
        yield _fail("vault", "no folder is set for it", str(error))
        return
    yield from check_vault(settings)
    yield from check_tiers(settings)
    yield check_signatures(settings)


def check_temporary_folder() -> Check:
    """Find the folder to compile in, and say why it is not one that is named for temporary files."""
    name, places = "temporary folder", scratch_places()
    try:
        root = scratch_root()
    except TemporaryFolderError as error:
        remedy = f"{error} Where Python finds none either, torch needs TORCHINDUCTOR_CACHE_DIR to be imported at all."
        return _fail(name, "none can be used to compile in", remedy)
    problems = [f"{place.folder} {place.problem}" for place in places if place.problem and place.is_named]
    free = render.size_text(shutil.disk_usage(root).free)
    if not problems:
        return _ok(name, f"{root}, {free} free")
    return _ok(name, f"{root}, {free} free, for {'; '.join(problems)}", "Set TMPDIR to another folder.")


def check_system_root() -> Check:
    is_read_only = bool(os.statvfs("/").f_flag & os.ST_RDONLY)
    return _ok("root file system", "read-only" if is_read_only else "writable")


def check_user_folders() -> Iterator[Check]:
    """Find where this user's config file, listings and notes go; each can be done without."""
    for kind in ("config", "cache", "state"):
        name = f"{kind} folder"
        try:
            folder = user_folder(kind)
        except NoHomeError as error:
            yield _ok(name, "none, and nothing is kept there", str(error))
            continue
        place = next(place for place in (folder, *folder.parents) if place.exists())
        if kind == "config" or os.access(place, os.W_OK | os.X_OK):
            yield _ok(name, str(folder))
        else:
            variable = f"XDG_{kind.upper()}_HOME"
            yield _ok(name, f"{folder} cannot be written, and nothing is kept there", f"Set HOME or {variable}.")


def check_signatures(settings: Settings) -> Check:
    """Check that the trusted keys can be read, and are enough for the policy."""
    from pipevault.store.trust.signing_keys import load_trusted

    try:
        trusted = load_trusted(settings.trusted_keys)
    except PipevaultError as error:
        return _fail("signatures", "trusted_keys cannot be used", str(error))
    policies = {settings.signature, *(tier.signature for tier in settings.tiers)}
    if "require" in policies and not trusted:
        return _fail(
            "signatures",
            "required, and no key is trusted: no entry can be loaded",
            "Name public keys in trusted_keys (PIPEVAULT_TRUSTED_KEYS).",
        )
    return _ok("signatures", f"{settings.signature}, {len(trusted)} trusted keys")


def check_python() -> Check:
    return _ok("python", f"{platform.python_version()} ({sys.executable})")


def check_torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of the build is missing
        return _fail("torch", f"cannot be imported ({error})", _INSTALL_TORCH)
    version = str(torch.__version__)
    if is_too_old(version):
        try:
            require_nexfort()
        except UnusableBackendError:
            return _fail("torch", version, _INSTALL_TORCH)
        return _ok("torch", f"{version}, for backend nexfort alone", f"For backend inductor: {_INSTALL_TORCH}")
    return _ok("torch", version, untried_text(version) or "")


def check_packages() -> Iterator[Check]:
    for name in NEEDED_PACKAGES:
        try:
            yield _ok(name, version(name))
        except PackageNotFoundError:
            yield _fail(name, "not installed", f"Run: pip install {name}")


def check_compiler() -> Check:
    """Compile and link a program of one line with the compiler that torch would use."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(compiler)
    if found is None:
        return _fail(
            "c++ compiler",
            f"{compiler} was not found",
            "Install g++ or name a compiler in CXX; without one, only what others froze can be loaded.",
        )
    try:
        with scratch_folder("doctor") as folder:
            source = folder / "try.cpp"
            source.write_text(_PROGRAM, "utf-8")
            result = subprocess.run(
                [found, "-std=c++17", "-o", str(source.with_suffix(".out")), str(source)],
                capture_output=True,
                text=True,
                timeout=_COMPILER_TIMEOUT_S,
                check=False,
            )
    except TemporaryFolderError:
        return _fail("c++ compiler", f"{found} was not tried", "Fix the temporary folder first.")
    except (OSError, subprocess.TimeoutExpired) as error:
        return _fail("c++ compiler", f"{found} does not run ({error})", "Install g++ again.")
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[0]
        return _fail("c++ compiler", f"{found} cannot compile ({reason})", "Install g++ with libstdc++.")
    return _ok("c++ compiler", found)


def check_gpu() -> Check:
    try:
        import torch
    except (ImportError, OSError):
        return _ok("gpu", "unknown without torch")
    if not torch.cuda.is_available():
        return _ok("gpu", "none: graphs are frozen for the CPU")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return _ok("gpu", ", ".join(names))


def check_tiers(settings: Settings) -> Iterator[Check]:
    """Check each tier but the vault of ``settings.dir``, which has lines of its own."""
    from pipevault.store.tiers.tiers import Tiers

    tiers = Tiers.open(settings)
    for tier in tiers.order:
        if tier == tiers.own_tier:
            continue
        name = f"tier {tier.dir}"
        try:
            access = "writable" if tiers.is_writable(tier) else "read-only"
        except VaultError as error:
            yield _fail(name, "every load leaves it out", str(error))
            continue
        copied = "hits are copied" if tier.copy else "hits are not copied"
        yield _ok(name, f"{access}, {copied}, signature {tiers.policy(tier)}")


def check_vault(settings: Settings) -> Iterator[Check]:
    root = settings.dir
    try:
        is_made = root.exists() and not (root.is_dir() and not any(root.iterdir()))
        vault = Vault.of(settings) if is_made else None
    except (VaultError, OSError) as error:
        yield _fail("vault", f"{root} cannot be used", str(error))
        return
    if vault is None:
        yield _check_future_vault(root)
        yield _check_free_space(root)
        return
    yield _ok("vault", str(vault.root))
    for name, check in (
        ("permissions", _check_permissions),
        ("entries", _check_entries),
        ("orphans", _check_orphans),
        ("foreign files", _check_foreign),
    ):
        yield _guarded(name, check, vault)
    yield _check_free_space(root)


def _guarded(name: str, check: Callable[[Vault], Check], vault: Vault) -> Check:
    """Make a check that fails where the vault itself raises an error, so that the others still run."""
    try:
        return check(vault)
    except PipevaultError as error:
        return _fail(name, "could not be checked", str(error))


def _check_future_vault(root: Path) -> Check:
    parent = next(folder for folder in (root, *root.parents) if folder.exists())
    if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
        return _ok("vault", f"{root} will be made at the first freeze")
    return _fail("vault", f"{root} cannot be made", f"Make {parent} writable, or give another folder.")


def _check_permissions(vault: Vault) -> Check:
    try:
        check_root(vault.root, trust=vault.trust)
        check_ownership(vault.layout.vault_file, root=vault.root, trust=vault.trust)
    except UnsafeVaultError as error:
        return _fail("permissions", "native code is not loaded from here", str(error))
    if not vault.writable and Settings.resolve(dir=vault.root).mode == "require":
        return _ok("permissions", "read-only for this user, which mode require asks for")
    if not vault.writable:
        return _fail(
            "permissions",
            "read-only for this user",
            "Load in mode require, fix the permissions, or give another folder.",
        )
    if is_shared(vault.root):
        return _ok("permissions", f"writable, shared by the group {vault.root.stat().st_gid}")
    return _ok("permissions", "writable, by this user alone")


def _check_entries(vault: Vault) -> Check:
    entries = list(vault.manifests())
    broken = [entry for entry in entries if isinstance(entry, BrokenManifest)]
    if not broken:
        return _ok("entries", f"{len(entries)}, every manifest intact")
    return _fail(
        "entries",
        f"{len(entries)}, {len(broken)} with a manifest that cannot be used: {broken[0].reason}",
        _removal_command(vault, *(entry.key.short for entry in broken[:_SHOWN_FILES])),
    )


def _check_orphans(vault: Vault) -> Check:
    """Count the artifacts that no entry names, which do no harm but take space."""
    orphans = find_orphans(vault.layout)
    if not orphans:
        return _ok("orphans", "no artifact without an entry")
    size = render.size_text(sum(orphan.size_bytes for orphan in orphans))
    detail = f"{render.count_text(len(orphans), 'artifact', 'artifacts')}, {size}, without an entry"
    if any(orphan.removable for orphan in orphans):
        return _ok("orphans", detail, _removal_command(vault, "--orphans"))
    return _ok("orphans", f"{detail}, younger than an hour: a freeze may be about to name them")


def _removal_command(vault: Vault, *arguments: str) -> str:
    return f"Run: {shlex.join(['pipevault', 'rm', *arguments, '--dir', str(vault.root)])}"


def _check_foreign(vault: Vault) -> Check:
    foreign = list(islice(vault.foreign_files(), _SHOWN_FILES + 1))
    if not foreign:
        return _ok("foreign files", "none")
    shown = ", ".join(str(path) for path in foreign[:_SHOWN_FILES])
    more = " and more" if len(foreign) > _SHOWN_FILES else ""
    return _ok("foreign files", f"{shown}{more}", "They are ignored. Move them away if they are not meant.")


def _check_free_space(root: Path) -> Check:
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    free_bytes = shutil.disk_usage(place).free
    detail = render.size_text(free_bytes)
    if free_bytes >= FREE_SPACE_NEEDED_BYTES:
        return _ok("free space", detail)
    needed = render.size_text(FREE_SPACE_NEEDED_BYTES)
    return _fail("free space", detail, f"Free space on {place}: {needed} is a safe minimum for compiling.")
