"""Entries of small files, a vault of many of them, and child processes, for ``stress_vault.py``."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from pipevault.digest import Digest, digest_bytes
from pipevault.errors import VaultError
from pipevault.key import Key
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.vault import Vault

CREATED_AT = "2025-01-31T12:00:00+00:00"
CHANGING_CALLS = ("mkdir", "open", "write", "fchmod", "fsync", "replace", "rename", "link", "unlink", "rmdir", "utime")
PLANS_OF_A_MODEL = 10
SHARED = b"an artifact that every entry shares" * 200


@dataclass(frozen=True)
class Entry:
    """A manifest, the bytes of its artifacts, and files that hold them, ready to publish."""

    manifest: Manifest
    data: Mapping[Digest, bytes]
    files: Mapping[Digest, Path]

    @property
    def key(self) -> Digest:
        return self.manifest.key.digest


def make_entry(folder: Path, name: str, artifacts: Mapping[str, bytes]) -> Entry:
    """``name`` decides the key."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {digest_bytes(content): content for content in artifacts.values()}
    files = {digest: folder / digest.hex for digest in data}
    for digest, path in files.items():
        path.write_bytes(data[digest])
    refs = tuple(ArtifactRef(digest_bytes(content), len(content), each) for each, content in artifacts.items())
    key = Key({"pipeline": {"name": name}, "dtype": {"unet": "float32"}})
    return Entry(Manifest(key, {"unet": {"graphs": len(refs)}}, refs, {}, CREATED_AT), data, files)


def small_entry(folder: Path, name: str) -> Entry:
    """Two artifacts of its own and one that all such entries share."""
    own = {f"unet/{number}.pt2": f"{name} {number} ".encode() * 400 for number in range(2)}
    return make_entry(folder, name, {**own, "vae/0.pt2": SHARED})


def load(vault: Vault, key: Digest) -> Mapping[str, bytes] | None:
    """What a loader would be given: the bytes of each artifact by name, after every check; ``None`` if absent."""
    manifest = vault.lookup(key)
    if manifest is None:
        return None
    return {ref.name: vault.verified_path(ref).read_bytes() for ref in manifest.artifacts}


def state_of(vault: Vault, entry: Entry) -> str:
    """``whole``, ``absent``, or what is wrong."""
    try:
        found = load(vault, entry.key)
    except VaultError as error:
        return f"torn: {error}"
    if found is None:
        return "absent"
    published = {ref.name: entry.data[ref.digest] for ref in entry.manifest.artifacts}
    return "whole" if found == published else "torn: other bytes than those that were published"


def in_child(function: Callable[[], object]) -> int:
    """Start ``function`` in a forked process; its pid. The exit code is 0, or 1 with a traceback on an exception."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end_of(pid: int) -> int:
    """Wait for a child; its exit code, negative for the signal that ended it."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Kill this process before its changing call of the file system number ``step``; a write gets half way."""
    count = 0

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if name != "open" or arguments[1] & os.O_CREAT:
                if count >= step:
                    if name == "write":
                        original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
            return original(*arguments, **options)

        return call

    patches = [mock.patch.object(os, name, wrapped(name, getattr(os, name))) for name in CHANGING_CALLS]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def fill(vault: Vault, count: int) -> list[Digest]:
    """``count`` entries with manifests of 9 kB, as publishing writes them, but without fsync, which takes minutes."""
    parts = {"unet": {"status": "frozen", "reason": "", "graphs": [{"layout": "x" * 64, "build": "y" * 64}] * 50}}
    keys = []
    for number in range(count):
        content = f"artifact {number}".encode()
        ref = ArtifactRef(digest_bytes(content), len(content), "unet/0.pt2")
        factors = {
            "pipeline": {"class": "diffusers.StableDiffusionPipeline", "number": number},
            "call": {"height": 512, "width": 512, "batch_size": 1, "guidance": True},
            "architecture": {"unet": {"parameters": number // PLANS_OF_A_MODEL}},
            "dtype": {"unet": "float32", "vae.decoder": "float32"},
        }
        manifest = Manifest(Key(factors), parts, (ref,), {"check": {"distance": 0.0}}, CREATED_AT)
        for path, data in (
            (vault.layout.artifact_file(ref.digest), content),
            (vault.layout.manifest_file(manifest.key.digest), manifest.to_bytes()),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        keys.append(manifest.key.digest)
    return keys
