"""The rows of ``pipevault ls``. Those of a large vault are remembered in the user's cache folder.

Parsing thousands of manifests takes seconds, so ``pipevault/listings/<16 digits>.json`` holds, for each key, the stamp
of its manifest (times, inode, size) and its row; the digits are the first of the SHA-256 of the vault's path. A
manifest whose stamp differs is read again. The file only decides what is shown; one that cannot be read is replaced.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from pipevault import __version__
from pipevault.cli import render
from pipevault.digest import Digest, digest_bytes
from pipevault.errors import CorruptEntryError, NewerVaultError, NoHomeError, VaultError
from pipevault.files.atomic import make_folder, write_file
from pipevault.reading import read_file
from pipevault.settings.user_folders import user_folder
from pipevault.store import inventory
from pipevault.store.manifest import BrokenManifest, Manifest
from pipevault.store.retention.pins import read_pins
from pipevault.store.retention.usage import last_uses_s
from pipevault.store.vault import Vault

REMEMBERED_FROM = 200
"""Entries; a smaller vault is read each time."""
FIELDS = ("kind", "model", "call", "dtype", "torch", "device")
_DIGITS = 16
_LIMIT_BYTES = 1 << 30
_FORM = f"{__version__} 3"
"""Rows that another release, or another form of them, remembered are not used."""
_Record: TypeAlias = tuple[str, str, tuple[str, ...], dict[str, int]]
"""Stamp, time, cells and artifacts of an entry."""


class _Listing(msgspec.Struct):
    version: str
    rows: dict[str, _Record]


@dataclass(frozen=True)
class Row:
    """An entry: ``cells`` are its texts for :data:`FIELDS`, ``artifacts`` sizes in bytes by the first digits of a
    digest. ``used_at``: its last use, ISO 8601; empty for none.
    """

    key: Digest
    created_at: str
    cells: tuple[str, ...]
    artifacts: Mapping[str, int]
    used_at: str
    pins: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return sum(self.artifacts.values())

    def text(self, name: str) -> str:
        """Return what a name in ``--filter`` and ``--sort`` stands for: one of :data:`FIELDS`, or ``pin``."""
        return ", ".join(self.pins) if name == "pin" else self.cells[FIELDS.index(name)]

    def fits(self, name: str, value: str) -> bool:
        """Tell whether ``value`` is one of its texts under ``name``, as in ``cpu`` or ``float16, float32``."""
        return value.lower() in self.text(name).lower().split(", ")

    def shown(self) -> tuple[str, ...]:
        kind, model, call, dtype, torch, device = self.cells
        used = render.age_text(self.used_at).removesuffix(" ago").removeprefix("just ") if self.used_at else "never"
        called = call if kind == "graph" else f"{call}, {dtype}".strip(", ")
        size = render.size_text(self.size_bytes)
        return (self.key.short, model, called, torch, device, size, used, self.text("pin"))


def read_rows(vault: Vault) -> tuple[list[Row], list[BrokenManifest]]:
    """Return the entries, sorted by key, and those that cannot be used. :class:`VaultError`."""
    stamps = inventory.manifest_stamps(vault.layout)
    file = _file(vault) if len(stamps) >= REMEMBERED_FROM else None
    known = _load(file) if file else {}
    used_s, pins = last_uses_s(vault.layout), defaultdict[Digest | None, list[str]](list)
    for pin in read_pins(vault.layout):
        pins[pin.key].append(pin.name)
    rows, broken, is_new = [], [], len(known) != len(stamps)
    remembered: dict[str, _Record] = {}
    for key, stamp in stamps.items():
        record = known.get(key.hex)
        if record is None or record[0] != stamp:
            try:
                manifest = inventory.read_published(vault.layout, key)
            except (CorruptEntryError, NewerVaultError) as error:
                broken.append(BrokenManifest(vault.layout.manifest_file(key), str(error), key))
                continue
            if manifest is None:
                continue
            artifacts = {digest.hex[:_DIGITS]: size for digest, size in manifest.artifact_sizes.items()}
            record, is_new = (stamp, manifest.created_at, cells_of(manifest), artifacts), True
        remembered[key.hex] = record
        names = tuple(pins.get(key, ()))
        rows.append(Row(key, record[1], record[2], record[3], render.time_text(used_s.get(key)), names))
    if file and is_new:
        _save(file, remembered)
    return rows, broken


def _file(vault: Vault) -> Path | None:
    try:
        folder = user_folder("cache")
    except NoHomeError:
        return None
    return folder / "listings" / f"{digest_bytes(os.fsencode(vault.root)).hex[:_DIGITS]}.json"


def _load(file: Path) -> dict[str, _Record]:
    try:
        listing = msgspec.json.decode(read_file(file, limit_bytes=_LIMIT_BYTES), type=_Listing)
    except (OSError, ValueError, RecursionError):
        return {}
    return listing.rows if listing.version == _FORM else {}


def _save(file: Path, rows: dict[str, _Record]) -> None:
    # Without it the next listing is slower, and nothing else.
    with suppress(OSError, VaultError):
        make_folder(file.parent)
        write_file(file, msgspec.json.encode(_Listing(_FORM, rows)))


def cells_of(manifest: Manifest) -> tuple[str, ...]:
    """Return the texts of :data:`FIELDS`: for a graph the class of its part, and its signature in place of a call."""
    factors, is_graph = manifest.key.factors, manifest.key.kind == "graph"
    toolchain = factors.get("toolchain")
    torch = toolchain.get("torch", "") if isinstance(toolchain, Mapping) else ""
    return (
        manifest.key.kind,
        _part_class_text(factors) if is_graph else _leaf_texts(factors.get("pipeline"))[0].rpartition(".")[2],
        str(manifest.info.get("signature_text", "")) if is_graph else call_text(factors.get("call", {})),
        ", ".join(dict.fromkeys(_leaf_texts(factors["dtype"]))) if "dtype" in factors else "",
        str(torch).partition("+")[0],
        _device_text(factors.get("machine")),
    )


def _device_text(machine: Any) -> str:
    """Return ``cpu``, or ``cuda, NVIDIA H100 PCIe`` for a GPU."""
    leaves = [(name.rpartition(".")[2], value) for name, value in render.flat(machine) if isinstance(value, str)]
    return ", ".join(dict.fromkeys(value for wanted in ("type", "name") for name, value in leaves if name == wanted))


def _part_class_text(factors: Mapping[str, Any]) -> str:
    """Return the last name of the first ``class`` among the architecture of a part, or else its other factors."""
    leaves = [*render.flat(factors.get("architecture", {})), *render.flat(factors)]
    classes = (value for name, value in leaves if name.rpartition(".")[2] == "class" and isinstance(value, str))
    return next((value.rpartition(".")[2] for value in classes), "")


def call_text(call: Any) -> str:
    """Return ``768x512, 9 frames, batch 2, guidance``, then each further factor with its name unless it is as usual."""
    if not isinstance(call, Mapping):
        return render.value_text(call)
    usual = {"batch_size": 1, "prompts": call.get("batch_size"), "images_per_prompt": 1, "output": "decoded"}
    rest = {name: value for name, value in call.items() if value is not None and value != usual.get(name)}
    texts = []
    if {"width", "height"} <= rest.keys():
        texts.append(f"{rest.pop('width')}x{rest.pop('height')}")
    for name, form in (("num_frames", "{} frames"), ("batch_size", "batch {}")):
        if name in rest:
            texts.append(form.format(rest.pop(name)))
    if rest.pop("guidance", None):
        texts.append("guidance")
    leaves = ((name.removeprefix("arguments."), value) for name, value in render.flat(rest) if name)
    return ", ".join([*texts, *(f"{name}={render.value_text(value)}" for name, value in leaves)])


def _leaf_texts(value: Any) -> list[str]:
    return [render.value_text(leaf) for _, leaf in render.flat(value)]
