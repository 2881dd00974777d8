"""Kills and damages for ``stress_vault.py``: what a vault holds afterwards, and what a loader would be given."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from figures import Figure
from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.errors import LockTimeoutError, VaultError
from pipevault.key import Key
from pipevault.store.bundle import export_bundle, import_bundle
from pipevault.store.places import iter_foreign
from pipevault.store.retention.leftovers import sweep
from pipevault.store.retention.prune import carry_out, plan_prune
from pipevault.store.trust.signature import check_signature, sign_entry
from pipevault.store.trust.signing_keys import PrivateKey, PublicKey
from pipevault.store.vault import Vault
from stress_entries import Entry, end_of, in_child, killed_at, small_entry, state_of

ENTRIES = 8
FIRST_STEPS = 200
KILLED = -signal.SIGKILL


def measure_kills(folder: Path, *, kills: int, seed: int) -> list[Figure]:
    """Kill ``kills`` processes that publish, prune or import, one half at a random moment and one at a write step."""
    chance = random.Random(seed)
    world = _World(folder)
    done: Counter[str] = Counter()
    torn: list[str] = []
    stuck: list[str] = []
    lost: list[str] = []
    durations_s: dict[str, float] = {}
    steps = dict.fromkeys(("publish", "prune", "import"), FIRST_STEPS)
    survived = 0
    while sum(done.values()) < kills:
        name = ("publish", "prune", "import")[sum(done.values()) % 3]
        work, may_go = world.prepare(name, chance)
        if name not in durations_s or chance.random() < 0.5:
            step = chance.randrange(steps[name]) if name in durations_s else 1 << 30
            started_s = time.perf_counter()
            code = end_of(in_child(lambda step=step, work=work: _work_until(step, work)))  # type: ignore[misc]
            durations_s.setdefault(name, time.perf_counter() - started_s)
            # How many steps the operation has shows while going: fewer than one that it survived.
            steps[name] = (
                max(10, min(steps[name], step + 5)) if code == 0 else steps[name] + 2 * (step > steps[name] - 5)
            )
        else:
            pid = in_child(work)
            time.sleep(chance.random() * durations_s[name])
            os.kill(pid, signal.SIGKILL)
            code = end_of(pid)
        done[name] += code == KILLED
        survived += code == 0
        if code not in (0, KILLED):
            torn.append(f"{name} ended with {code}")
        states = {key: state_of(world.vault, entry) for key, entry in world.entries.items()}
        torn += [f"{name}: {state}" for state in states.values() if state.startswith("torn")]
        lost += [f"{name}: {key.short}" for key in world.there - may_go if states[key] != "whole"]
        stuck += [f"{name}: {key.short}" for key in world.entries if not _lock_is_free(world.vault, key)]
        world.there = {key for key, state in states.items() if state == "whole"}
    sweep(world.vault.layout)
    left = [path for path in world.vault.layout.tmp_dir.iterdir()] if world.vault.layout.tmp_dir.exists() else []
    foreign = list(iter_foreign(world.vault.layout))
    details = ", ".join(f"{number} {name}" for name, number in sorted(done.items()))
    return [
        Figure("processes killed", f"{sum(done.values())} ({details}; {survived} more came to their end)", str(kills)),
        Figure("torn entries after kills", _listed(torn), "0", not torn),
        Figure("stuck locks after kills", _listed(stuck), "0", not stuck),
        Figure("published entries lost after kills", _listed(lost), "0", not lost),
        Figure("folders in tmp/ after a sweep", _listed([str(path) for path in left]), "0", not left),
        Figure("foreign files after kills", _listed([str(path) for path in foreign]), "0", not foreign),
    ]


class _World:
    """A vault, the entries that come and go in it, and a bundle of three of them. One entry is pinned."""

    def __init__(self, folder: Path) -> None:
        made = [small_entry(folder / "source", f"entry {number}") for number in range(ENTRIES)]
        self.entries: Mapping[Digest, Entry] = {entry.key: entry for entry in made}
        self.vault = Vault.open(folder / "vault")
        for entry in made:
            self.vault.publish(entry.manifest, entry.files)
        self.there = set(self.entries)
        self.pinned = made[0].key
        self.vault.pin(self.pinned, "prod")
        self.bundled = [entry.key for entry in made[1:4]]
        self.bundle = folder / "three.bundle"
        export_bundle(self.vault, self.bundled, self.bundle)

    def prepare(self, name: str, chance: random.Random) -> tuple[Callable[[], object], set[Digest]]:
        """What a child should do, and which published entries it may remove."""
        if name == "prune":
            for entry in self.entries.values():
                self.vault.publish(entry.manifest, entry.files)
            self.there = set(self.entries)
            plan = plan_prune(self.vault, max_size=chance.randrange(1, 40_000), now_s=time.time())
            return (lambda: carry_out(self.vault, plan)), {going.key for going in plan.entries} - {self.pinned}
        absent = self.bundled if name == "import" else [chance.choice(sorted(set(self.entries) - {self.pinned}))]
        present = [key for key in absent if key in self.there]
        self.vault.remove(self.vault.plan_removal(present))
        self.there -= set(absent)
        if name == "import":
            return (lambda: import_bundle(self.vault, self.bundle)), set()
        entry = self.entries[absent[0]]
        return (lambda: self._publish(entry)), set()

    def _publish(self, entry: Entry) -> None:
        with self.vault.lock(entry.key, timeout_s=60):
            self.vault.publish(entry.manifest, entry.files)


def _work_until(step: int, work: Callable[[], object]) -> None:
    with killed_at(step):
        work()


def _lock_is_free(vault: Vault, key: Digest) -> bool:
    try:
        with vault.lock(key, timeout_s=0):
            return True
    except LockTimeoutError:
        return False


def measure_damages(folder: Path, *, damages: int, seed: int) -> list[Figure]:
    """Damage entries in ``damages`` ways and load each: it must be refused, or be exactly what was published."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    chance = random.Random(seed)
    sound = Vault.open(folder / "sound")
    key = PrivateKey(Ed25519PrivateKey.generate())
    entries = [small_entry(folder / "source", f"entry {number}") for number in range(4)]
    for entry in entries:
        sound.publish(entry.manifest, entry.files)
        sign_entry(sound.layout, entry.manifest, key)
    damaged = Vault.open(shutil.copytree(sound.root, folder / "damaged"))
    original = _Original(damaged.root)
    done: Counter[str] = Counter()
    refused = harmless = unsigned = 0
    missed: list[str] = []
    for number in range(damages):
        entry = entries[number % len(entries)]
        name = chance.choice(sorted(_DAMAGES))
        _DAMAGES[name](damaged, entry, entries, chance)
        done[name] += 1
        trusted = key.public if name in _NEED_SIGNATURE else None
        unsigned += trusted is not None and _loaded(damaged, entry, None) not in (None, _published(entry))
        found = _loaded(damaged, entry, trusted)
        if found is None:
            refused += 1
        elif found == _published(entry):
            harmless += 1
        else:
            missed.append(name)
        original.restore()
    kinds = f"{len(done)} kinds, each {min(done.values())} times or more"
    value = f"{damages} ({kinds}): {refused} refused, {harmless} changed nothing that is loaded"
    return [
        Figure("random damages", value, str(damages)),
        Figure("damages not noticed before the loader", _listed(missed), "0", not missed),
        Figure(
            "edited manifests with a right self digest that only a signature tells",
            f"{unsigned} of {sum(done[name] for name in _NEED_SIGNATURE)}, all refused under signature = require",
        ),
    ]


class _Original:
    """A folder as it is now; :meth:`restore` puts back what was changed since, and only that."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files = {path: (path.read_bytes(), path.stat().st_mode) for path in root.rglob("*") if path.is_file()}
        self._identities = {path: self._identity(path) for path in self._files}

    def restore(self) -> None:
        for path in sorted(self._root.rglob("*")):
            if path.is_symlink() or (path not in self._files and path.is_file()):
                path.unlink()
        for path, (data, mode) in self._files.items():
            if self._identity(path) != self._identities[path]:
                if path.is_dir():
                    path.rmdir()
                path.unlink(missing_ok=True)
                path.write_bytes(data)
                path.chmod(mode)
                self._identities[path] = self._identity(path)

    @staticmethod
    def _identity(path: Path) -> object:
        try:
            status = path.lstat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mode, status.st_size, status.st_ctime_ns


def _published(entry: Entry) -> Any:
    return entry.manifest, {ref.name: entry.data[ref.digest] for ref in entry.manifest.artifacts}


def _loaded(vault: Vault, entry: Entry, trusted: PublicKey | None) -> Any:
    """What a loader would be given; ``None``: it was refused, or is absent."""
    try:
        manifest = vault.lookup(entry.key)
        if manifest is None:
            return None
        if trusted is not None:
            check_signature(vault.layout, manifest, policy="require", trusted=(trusted,))
        return manifest, {ref.name: vault.verified_path(ref).read_bytes() for ref in manifest.artifacts}
    except VaultError:
        return None


def _any_artifact(vault: Vault, entry: Entry, chance: random.Random) -> Path:
    return vault.layout.artifact_file(chance.choice(entry.manifest.artifacts).digest)


def _rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def _flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    _rewrite(path, bytes(data))


def _cut(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    _rewrite(path, data[: chance.randrange(len(data))])


def _swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def _edit(vault: Vault, entry: Entry, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as somebody would who knows the format: with the self digest that fits."""
    path = vault.layout.manifest_file(entry.key)
    document = entry.manifest.to_bytes()
    body = json.loads(document)
    del body["self_digest"]
    change(body)
    _rewrite(path, canonical_json({**body, "self_digest": digest_bytes(canonical_json(body)).hex}))


def _other(entry: Entry, entries: list[Entry], chance: random.Random) -> Entry:
    return chance.choice([other for other in entries if other.key != entry.key])


def _edit_factors(body: dict[str, Any]) -> None:
    body["key"]["factors"]["dtype"]["unet"] = "float16"


def _edit_key(body: dict[str, Any]) -> None:
    _edit_factors(body)
    body["key"]["digest"] = Key(body["key"]["factors"]).digest.hex


def _swap_digests(body: dict[str, Any]) -> None:
    first, second = body["artifacts"][:2]
    for field in ("digest", "size_bytes"):
        first[field], second[field] = second[field], first[field]


def _link_outside(vault: Vault, entry: Entry, chance: random.Random) -> None:
    path = _any_artifact(vault, entry, chance)
    outside = vault.root.parent / "outside"
    shutil.copy(path, outside)
    path.unlink()
    path.symlink_to(outside)


def _folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


Damage = Callable[[Vault, Entry, list[Entry], random.Random], object]
_DAMAGES: Mapping[str, Damage] = {
    "bit of an artifact": lambda v, e, o, c: _flip(_any_artifact(v, e, c), c),
    "bit of a manifest": lambda v, e, o, c: _flip(v.layout.manifest_file(e.key), c),
    "truncated artifact": lambda v, e, o, c: _cut(_any_artifact(v, e, c), c),
    "truncated manifest": lambda v, e, o, c: _cut(v.layout.manifest_file(e.key), c),
    "bytes after a manifest": lambda v, e, o, c: _rewrite(
        v.layout.manifest_file(e.key), e.manifest.to_bytes() + bytes([c.randrange(256)])
    ),
    "bytes after an artifact": lambda v, e, o, c: _rewrite(
        v.layout.artifact_file(e.manifest.artifacts[0].digest), e.data[e.manifest.artifacts[0].digest] + b"\0"
    ),
    "artifact of zeros": lambda v, e, o, c: _rewrite(
        v.layout.artifact_file(e.manifest.artifacts[0].digest), bytes(e.manifest.artifacts[0].size_bytes)
    ),
    "artifact gone": lambda v, e, o, c: _any_artifact(v, e, c).unlink(),
    "artifact a folder": lambda v, e, o, c: _folder_instead(_any_artifact(v, e, c)),
    "artifact a link that leads outside": lambda v, e, o, c: _link_outside(v, e, c),
    "artifact writable for all": lambda v, e, o, c: _any_artifact(v, e, c).chmod(0o666),
    "two artifacts swapped": lambda v, e, o, c: _swap(
        *(v.layout.artifact_file(ref.digest) for ref in c.sample(e.manifest.artifacts, 2))
    ),
    "two manifests swapped": lambda v, e, o, c: _swap(
        v.layout.manifest_file(e.key), v.layout.manifest_file(_other(e, o, c).key)
    ),
    "edited factors": lambda v, e, o, c: _edit(v, e, _edit_factors),
    "edited factors and key": lambda v, e, o, c: _edit(v, e, _edit_key),
    "edited size": lambda v, e, o, c: _edit(v, e, lambda body: body["artifacts"][0].update(size_bytes=c.randrange(99))),
    "edited digest": lambda v, e, o, c: _edit(
        v, e, lambda body: body["artifacts"][0].update(digest=c.randbytes(32).hex())
    ),
    "an artifact more": lambda v, e, o, c: _edit(
        v, e, lambda body: body["artifacts"].append({"digest": "0" * 64, "name": "x", "size_bytes": 0})
    ),
    "edited name that leads outside": lambda v, e, o, c: _edit(
        v, e, lambda body: body["artifacts"][0].update(name="../../outside")
    ),
    "edited version": lambda v, e, o, c: _edit(v, e, lambda body: body.update(manifest_version=c.choice([0, 2, "1"]))),
    "a field more": lambda v, e, o, c: _edit(v, e, lambda body: body.update(extra=1)),
    "edited: artifacts change places": lambda v, e, o, c: _edit(v, e, _swap_digests),
    "edited: another entry's artifacts": lambda v, e, o, c: _edit(
        v,
        e,
        lambda body: body["artifacts"][0].update(
            digest=(other := _other(e, o, c).manifest.artifacts[0]).digest.hex, size_bytes=other.size_bytes
        ),
    ),
    "edited: parts": lambda v, e, o, c: _edit(v, e, lambda body: body["parts"].update(unet={"graphs": 99})),
    "edited: info": lambda v, e, o, c: _edit(v, e, lambda body: body["info"].update(note="edited")),
}
_NEED_SIGNATURE = frozenset(name for name in _DAMAGES if name.startswith("edited: "))


def _listed(faults: list[str]) -> str:
    return f"{len(faults)}{': ' + '; '.join(faults[:3]) if faults else ''}"
