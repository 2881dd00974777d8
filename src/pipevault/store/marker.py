"""The marker ``vault.json``, which makes a folder a vault: ``{"created_at": "<ISO 8601>", "pipevault_vault": 2}``."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from pipevault.digest import canonical_json
from pipevault.errors import DamagedVaultError, NewerVaultError, NotAVaultError, OldVaultError, UnsafeVaultError
from pipevault.files.atomic import SHARED_FOLDER_MODE, is_shared, make_folder, vault_errors
from pipevault.files.documents import Format
from pipevault.reading import read_file
from pipevault.store.layout import SYSTEM_NAMES, Layout
from pipevault.store.manifest import now_utc
from pipevault.store.publish import write_document

VAULT_VERSION = 2
_MARKER_LIMIT_BYTES = 1 << 20


class _Marker(msgspec.Struct):
    pipevault_vault: int


_FORMAT = Format(
    _Marker,
    "pipevault_vault",
    VAULT_VERSION,
    damaged=lambda problem: DamagedVaultError(
        f'{problem} If it marks a vault, restore the file: {{"pipevault_vault": {VAULT_VERSION}}}; else give another '
        "folder.",
        problem.path.parent,
    ),
    newer=lambda problem: NewerVaultError(f"{problem} Upgrade pipevault, or give another folder.", problem.path.parent),
    older=lambda problem: OldVaultError(
        f"{problem} It marks a vault of version {problem.version}, which pipevault 0.1 wrote and which is left as it "
        "is. Give another folder, or delete this one: graphs are frozen again where they are needed.",
        problem.path.parent,
    ),
    canonical=False,
)


def ensure_vault(layout: Layout, *, create: bool, shared: bool = False, mark: bool = True) -> None:
    """Check that ``layout.root`` is a vault of a known version; make it one if it is empty or absent and
    ``create``, for its group too if it is to be ``shared``. Unless ``mark``, only its folder is made.

    :class:`NotAVaultError`: it is a file, holds other files, or is absent and ``create`` is false.
    :class:`DamagedVaultError`, :class:`NewerVaultError`, :class:`OldVaultError`: of its marker.
    :class:`UnsafeVaultError`: one of its folders is a link that leads out of it.
    :class:`VaultNotWritableError`: it cannot be created.
    """
    root = layout.root
    if not (is_vault := _read_marker(layout)) and (foreign := foreign_names(layout)):
        is_vault = _read_marker(layout)  # another process made it, and filled it, between the two looks
        if not is_vault:
            raise NotAVaultError(
                f"{root} holds files ({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}) but no "
                f"{layout.vault_file.name}, so it is not a vault. Give another folder, or an empty one.",
                root,
            )
    for folder in layout.folders:
        if folder.is_symlink() and not Path(os.path.realpath(folder)).is_relative_to(root):
            raise UnsafeVaultError(
                f"{folder} is a link that leads out of the vault, to {os.path.realpath(folder)}: what is there is not "
                f"touched. Remove the link: rm {folder}",
                folder,
            )
    if is_vault:
        return
    if not create:
        raise NotAVaultError(f"Found no vault at {root}. Give the folder of a vault, or freeze something there.", root)
    make_folder(root, alone=True)
    if shared and not is_shared(root):
        with vault_errors(root, "shared"):
            os.chmod(root, SHARED_FOLDER_MODE)
    if mark:
        marker = canonical_json({"pipevault_vault": VAULT_VERSION, "created_at": now_utc()})
        write_document(layout, layout.vault_file, marker)


def is_writable(layout: Layout) -> bool:
    """Return whether this user may write in every folder of the vault, as the system sees it now."""
    return all(os.access(folder, os.W_OK | os.X_OK) for folder in (layout.root, *layout.folders) if folder.exists())


def _read_marker(layout: Layout) -> bool:
    path = layout.vault_file
    with vault_errors(path, "read"):
        try:
            data = read_file(path, limit_bytes=_MARKER_LIMIT_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return False
    _FORMAT.parse(data, path)
    return True


def foreign_names(layout: Layout) -> list[str]:
    """Return what stands in the root other than what an interrupted creation leaves: staging folders in ``tmp/``."""
    root = layout.root
    with vault_errors(root, "read"):
        try:
            names = set(os.listdir(root)) - SYSTEM_NAMES
            if layout.tmp_dir.is_dir() and all(layout.is_staging(path) for path in layout.tmp_dir.iterdir()):
                names.discard(layout.tmp_dir.name)
        except FileNotFoundError:
            return []
        except NotADirectoryError as error:
            text = f"{root} is a file, or lies below one; a vault is a folder. Give another."
            raise NotAVaultError(text, root) from error
    return sorted(names)
