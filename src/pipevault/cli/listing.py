"""The rows of ``pipevault ls``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipevault.cli import render
from pipevault.cli.pins import read_pins
from pipevault.errors import CorruptEntryError, NewerVaultError
from pipevault.store import inventory
from pipevault.store.manifest import Manifest
from pipevault.store.places import iter_keys
from pipevault.store.read import BrokenManifest
from pipevault.store.retention.usage import last_uses_s
from pipevault.store.vault import Vault

FIELDS = ("kind", "model", "call", "dtype", "torch", "device")


@dataclass(frozen=True)
class Row:
    """An entry, the time of its last use in ISO 8601 (empty for none), and its pins."""

    manifest: Manifest
    used_at: str
    pins: tuple[str, ...]

    @cached_property
    def cells(self) -> tuple[str, ...]:
        return cells_of(self.manifest)

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
        key, size = self.manifest.key.digest.short, render.size_text(self.manifest.size_bytes)
        return (key, model, called, torch, device, size, used, self.text("pin"))


def read_rows(vault: Vault) -> tuple[list[Row], list[BrokenManifest]]:
    """Return the entries, sorted by key, and those that cannot be used. :class:`VaultError`."""
    used_s, pins = last_uses_s(vault.layout), read_pins(vault.layout)
    rows, broken = [], []
    for key in iter_keys(vault.layout):
        try:
            manifest = inventory.read_published(vault.layout, key)
        except (CorruptEntryError, NewerVaultError) as error:
            broken.append(BrokenManifest(vault.layout.manifest_file(key), str(error), key))
            continue
        if manifest is not None:
            names = tuple(pin.name for pin in pins if pin.key == key)
            rows.append(Row(manifest, render.time_text(used_s.get(key)), names))
    return rows, broken


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
