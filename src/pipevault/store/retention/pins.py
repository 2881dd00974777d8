"""Pins: entries that no pruning removes, by name. ``pins/<name>.json`` is canonical JSON::

    {"created_at":"2025-01-31T12:00:00+00:00","key":"<key digest>","pin_version":1}

A pin that cannot be read may mean any entry, so nothing is removed until it can be read or is unpinned.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from pipevault.digest import Digest
from pipevault.errors import PinError, PinNameError, UnknownKeyError, UnknownPinError, VaultError
from pipevault.files.atomic import create_file, fsync_folder, make_folder, vault_errors, write_file
from pipevault.files.documents import Format, Sha256
from pipevault.reading import read_file
from pipevault.store.layout import PIN_NAME, Layout
from pipevault.store.manifest import now_utc
from pipevault.store.places import children
from pipevault.store.publish import staging_folder

PIN_VERSION = 1


class _Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    created_at: str
    key: Sha256
    pin_version: int


_FORMAT = Format(
    _Pin,
    "pin_version",
    PIN_VERSION,
    damaged=lambda problem: PinError(
        f"The pin {problem} What it holds is not known and nothing is removed. Remove it and pin the entry again: "
        f"pipevault unpin {problem.path.stem}",
        problem.path.stem,
    ),
    newer=lambda problem: PinError(f"The pin {problem} Upgrade pipevault.", problem.path.stem),
)


@dataclass(frozen=True)
class Pin:
    """A pin; ``key`` is ``None`` if it cannot be read, and ``problem`` says what is wrong with it."""

    name: str
    key: Digest | None
    problem: str = ""


def read_pins(layout: Layout) -> list[Pin]:
    """Return the pins, sorted by name, those that cannot be read too."""
    pins = []
    for name in pin_names(layout):
        try:
            key = read_pin(layout, name)
        except (PinError, VaultError) as error:
            pins.append(Pin(name, None, str(error)))
            continue
        if key is not None:
            pins.append(Pin(name, key, "" if layout.manifest_file(key).exists() else "its entry is gone"))
    return pins


def pins(layout: Layout) -> dict[str, Digest]:
    """Return the key of each pin, sorted by name. :class:`PinError` names one that cannot be read."""
    return {name: key for name in pin_names(layout) if (key := read_pin(layout, name)) is not None}


def pin_names(layout: Layout) -> list[str]:
    names = map(layout.pin_name, children(layout.pins_dir))
    return sorted(name for name in names if name is not None)


def read_pin(layout: Layout, name: str) -> Digest | None:
    """Return the key that ``name`` pins, ``None`` if no pin has this name. :class:`PinError`: it cannot be read."""
    path = layout.pin_file(name)
    with vault_errors(path, "read"):
        try:
            data = read_file(path)
        except FileNotFoundError:
            return None
    return Digest(_FORMAT.parse(data, path).key)


def pin(layout: Layout, key: Digest, name: str, *, move: bool = False) -> Digest | None:
    """Pin the entry ``key`` as ``name``; return the key that ``move`` took the name from. The same again changes
    nothing.

    :class:`PinNameError`: ``name`` is not a name. :class:`PinError`: it pins another entry and ``move`` is false.
    :class:`UnknownKeyError`: no entry has this key, or it was removed meanwhile.
    """
    _check_name(name)
    _require_entry(layout, key)
    data = _FORMAT.write(_Pin(now_utc(), key.hex, PIN_VERSION))
    path = layout.pin_file(name)
    make_folder(layout.pins_dir)
    held = _read_or_none(layout, name) if move else read_pin(layout, name)
    with staging_folder(layout) as folder:
        if move and held != key:
            write_file(path, data, staging=folder)
        elif held is None:
            try:
                create_file(path, data, staging=folder)
            except FileExistsError:  # another process was faster
                held = read_pin(layout, name)
    if not move and held not in (None, key):
        raise PinError(f"{name} pins {held} already. Give another name, or move it: --move", name)
    if not layout.manifest_file(key).exists():  # pruned before the pin was there
        if held is None:
            path.unlink(missing_ok=True)
        _require_entry(layout, key)
    return held if held != key else None


def unpin(layout: Layout, name: str) -> Digest | None:
    """Remove the pin ``name``, also a damaged one; return the key it had, if it could be read.
    :class:`UnknownPinError`.
    """
    _check_name(name)
    key = _read_or_none(layout, name)
    path = layout.pin_file(name)
    with vault_errors(path, "removed"):
        try:
            path.unlink()
        except FileNotFoundError:
            known = ", ".join(pin_names(layout))
            text = f"Unknown pin {name}. {f'Pins: {known}.' if known else 'There are none.'}"
            raise UnknownPinError(text, name) from None
        fsync_folder(path.parent)
    return key


def _read_or_none(layout: Layout, name: str) -> Digest | None:
    try:
        return read_pin(layout, name)
    except (PinError, VaultError):  # damaged, or no file at all
        return None


def _check_name(name: str) -> None:
    if not PIN_NAME.fullmatch(name):
        raise PinNameError(
            f"Invalid name of a pin {name!r}: expected at most 64 letters, digits, '.', '_', '-', the first a letter "
            "or digit.",
            name,
        )


def _require_entry(layout: Layout, key: Digest) -> None:
    if not layout.manifest_file(key).exists():
        raise UnknownKeyError(f"No entry of {layout.root} has the key {key.short}, so it cannot be pinned.", key.hex)
