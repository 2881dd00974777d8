"""Anything that can happen to a vault, in any order, against a model of a few dictionaries."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.fault_steps import strike_at
from helpers.store_entries import Entry, make_entry
from pipevault.digest import Digest, digest_file
from pipevault.errors import CorruptEntryError, EntryInUseError, PinError, UnknownKeyError
from pipevault.store.bundle import export_bundle, import_bundle
from pipevault.store.locks.leases import Lease, live_leases
from pipevault.store.places import iter_foreign
from pipevault.store.retention.pins import pins
from pipevault.store.retention.prune import carry_out, plan_prune
from pipevault.store.retention.removal import refuse_in_use
from pipevault.store.vault import Vault

HAS_VERIFY = importlib.util.find_spec("pipevault.store.check") is not None
SHARED = b"shared by all" * 100
NAMES = ("a", "b", "c", "d")
names = st.sampled_from(NAMES)
pin_names = st.sampled_from(("prod", "next"))
steps = st.integers(min_value=0, max_value=60)


class Crash(BaseException):
    """The end of the process, as far as the code can tell: no handler of errors may take it for one."""


def crash(name: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if name == "write":
        original(arguments[0], arguments[1][: len(arguments[1]) // 2])
    raise Crash


@contextmanager
def crash_at(step: int | None) -> Iterator[None]:
    """Every change of the file system from number ``step`` on fails; ``None``: none does."""
    if step is None:
        yield
        return
    with suppress(Crash), strike_at(step, crash):
        yield


class VaultMachine(RuleBasedStateMachine):
    """``manifests``: ``whole`` or ``damaged`` for each that is there; ``bad``: artifacts that are damaged."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="pipevault-machine-"))
        self.patches = (
            mock.patch.object(os, "fsync"),
            mock.patch.dict(os.environ, XDG_STATE_HOME=str(self.folder)),
            # What other processes leave in the system's temporary folder would change the number of steps.
            mock.patch("pipevault.store.retention.leftovers.scratch_folders", return_value=[]),
        )
        for patch in self.patches:
            patch.start()
        self.vault = Vault.open(self.folder / "vault")
        self.entries = {
            name: make_entry(
                self.folder / "source", name, {"unet/0.pt2": SHARED, "vae/0.pt2": f"only {name}".encode() * 50}
            )
            for name in NAMES
        }
        self.keys = {entry.key: name for name, entry in self.entries.items()}
        self.manifests: dict[str, str] = {}
        self.bad: set[Digest] = set()
        self.pins: dict[str, str] = {}
        self.leases: dict[str, list[Lease]] = {}
        self.exported: dict[Path, tuple[str, ...]] = {}

    def teardown(self) -> None:
        for lease in (lease for leases in self.leases.values() for lease in leases):
            lease.release()
        for patch in self.patches:
            patch.stop()
        shutil.rmtree(self.folder)

    @initialize(chosen=st.sets(names))
    def begin(self, chosen: set[str]) -> None:
        for name in sorted(chosen):
            self.publish(name, None, False)

    def any_present(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.manifests)))

    def is_whole(self, name: str) -> bool:
        return self.manifests.get(name) == "whole" and not self.bad & self.entries[name].files.keys()

    def protected(self) -> set[str]:
        return {*self.pins.values(), *(name for name, leases in self.leases.items() if leases)}

    def healed(self, name: str) -> None:
        self.manifests[name] = "whole"
        self.bad -= self.entries[name].files.keys()

    def removed(self, name: str) -> None:
        """Nobody removes a damaged artifact of an entry that stays, so ``bad`` may keep what no entry needs."""
        del self.manifests[name]

    @contextmanager
    def perhaps_crashing(self, step: int | None, *, may_go: set[str]) -> Iterator[None]:
        """After a crash the model learns what is there; what was whole and may not go must be whole still."""
        whole = {name for name in NAMES if self.is_whole(name)}
        with crash_at(step):
            yield
            step = None
        if step is not None:
            self.learn()
            assert {name for name in NAMES if self.is_whole(name)} >= whole - may_go

    def learn(self) -> None:
        for name, entry in self.entries.items():
            path = self.vault.layout.manifest_file(entry.key)
            if not path.exists():
                self.manifests.pop(name, None)
            else:
                self.manifests[name] = "whole" if path.read_bytes() == entry.manifest.to_bytes() else "damaged"
        for digest in {digest for entry in self.entries.values() for digest in entry.files}:
            path = self.vault.layout.artifact_file(digest)
            is_bad = not path.exists() or digest_file(path) != digest
            (self.bad.add if is_bad else self.bad.discard)(digest)

    @rule(name=names, step=st.none() | steps, locked=st.booleans())
    def publish(self, name: str, step: int | None, locked: bool) -> None:
        entry = self.entries[name]
        with self.perhaps_crashing(step, may_go=set()):
            if locked and step is None:  # the system frees the lock of a process that dies; an exception does not
                with self.vault.lock(entry.key, timeout_s=0):
                    published = self.vault.publish(entry.manifest, entry.files)
            else:
                published = self.vault.publish(entry.manifest, entry.files)
            assert published == entry.manifest
            self.healed(name)

    @rule(name=names, step=st.none() | steps)
    def remove(self, name: str, step: int | None) -> None:
        key = self.entries[name].key
        if name in self.protected():
            with pytest.raises(EntryInUseError):
                refuse_in_use(self.vault.layout, [key])
            return
        refuse_in_use(self.vault.layout, [key])
        if name not in self.manifests:
            with pytest.raises(UnknownKeyError):
                self.vault.plan_removal([key])
            return
        plan = self.vault.plan_removal([key])
        with self.perhaps_crashing(step, may_go={name}):
            assert self.vault.remove(plan).keys == (key,)
            self.removed(name)

    @rule(share=st.floats(min_value=0, max_value=1), step=st.none() | steps)
    def prune(self, share: float, step: int | None) -> None:
        size_bytes = plan_prune(self.vault).size_bytes
        plan = plan_prune(self.vault, max_size=int(share * size_bytes))
        going = {self.keys[entry.key] for entry in plan.entries}
        damaged = {name for name, state in self.manifests.items() if state == "damaged"}
        assert not going & (self.protected() | damaged)
        if share == 0:
            assert going == self.manifests.keys() - self.protected() - damaged
        with self.perhaps_crashing(step, may_go=going):
            report = carry_out(self.vault, plan)
            assert {self.keys[going.key] for going in report.entries} == going
            for name in going:
                self.removed(name)

    @rule(name=names)
    def use(self, name: str) -> None:
        if name in self.manifests:
            self.vault.record_use(self.entries[name].key)

    @rule(name=names, pin=pin_names, move=st.booleans())
    def pin(self, name: str, pin: str, move: bool) -> None:
        if name not in self.manifests:
            with pytest.raises(UnknownKeyError):
                self.vault.pin(self.entries[name].key, pin, move=move)
        elif not move and self.pins.get(pin, name) != name:
            with pytest.raises(PinError):
                self.vault.pin(self.entries[name].key, pin)
        else:
            self.vault.pin(self.entries[name].key, pin, move=move)
            self.pins[pin] = name

    @rule(pin=pin_names)
    def unpin(self, pin: str) -> None:
        if pin in self.pins:
            assert self.vault.unpin(pin) == self.entries[self.pins.pop(pin)].key
        else:
            with pytest.raises(PinError):
                self.vault.unpin(pin)

    @precondition(lambda self: self.manifests)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        name = self.any_present(data)
        lease = self.vault.lease(self.entries[name].key)
        assert lease.held
        self.leases.setdefault(name, []).append(lease)

    @precondition(lambda self: any(self.leases.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name, leases in self.leases.items() if leases)))
        self.leases[name].pop().release()

    @precondition(lambda self: self.manifests)
    @rule(
        data=st.data(),
        what=st.sampled_from(("manifest", "shared artifact", "own artifact", "lost artifact")),
        longer=st.booleans(),
    )
    def damage(self, data: st.DataObject, what: str, longer: bool) -> None:
        name = self.any_present(data)
        entry = self.entries[name]
        if what == "manifest":
            self.spoil(self.vault.layout.manifest_file(entry.key), longer)
            self.manifests[name] = "damaged"
            return
        digest = entry.manifest.artifacts[0 if what == "shared artifact" else 1].digest
        path = self.vault.layout.artifact_file(digest)
        if what == "lost artifact":
            path.unlink(missing_ok=True)
        elif path.exists():
            self.spoil(path, longer)
        self.bad.add(digest)

    def spoil(self, path: Path, longer: bool) -> None:
        """Once more is damage, too; what was published does not come back."""
        content = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(content + b"!" if longer else bytes([(content[0] + 1) % 256]) + content[1:])

    @rule(chosen=st.sets(names, min_size=1))
    def export(self, chosen: set[str]) -> None:
        path = self.folder / f"{len(self.exported)}.bundle"
        keys = [self.entries[name].key for name in chosen]
        if chosen - self.manifests.keys():
            with pytest.raises((UnknownKeyError, CorruptEntryError)):
                export_bundle(self.vault, keys, path)
        elif not all(self.is_whole(name) for name in chosen):
            with pytest.raises(CorruptEntryError):
                export_bundle(self.vault, keys, path)
        else:
            export_bundle(self.vault, keys, path)
            self.exported[path] = tuple(chosen)
            return
        assert not path.exists()

    @precondition(lambda self: self.exported)
    @rule(data=st.data(), step=st.none() | steps)
    def import_(self, data: st.DataObject, step: int | None) -> None:
        path = data.draw(st.sampled_from(sorted(self.exported)))
        missing = {name for name in self.exported[path] if not self.is_whole(name)}
        with self.perhaps_crashing(step, may_go=set()):
            imported = {self.keys[key] for key in import_bundle(self.vault, path)}
            # One that shares a damaged artifact with another is whole as soon as the other is.
            assert imported <= missing
            for name in self.exported[path]:
                self.healed(name)

    @precondition(lambda self: HAS_VERIFY)
    @rule(fix=st.booleans())
    def verify(self, fix: bool) -> None:
        from pipevault.store.check import verify

        whole = {name for name in NAMES if self.is_whole(name)}
        verify(self.vault, fix=fix, progress=lambda *_: None)
        if fix:
            self.learn()
            assert {name for name in NAMES if self.is_whole(name)} == whole

    @rule(name=names, of=st.sampled_from(("manifest", "artifact")))
    def quarantine(self, name: str, of: str) -> None:
        """What a load does with what it finds damaged."""
        if name not in self.manifests or self.is_whole(name):
            return
        entry = self.entries[name]
        if self.manifests[name] == "damaged":
            assert self.vault.quarantine(self.vault.layout.manifest_file(entry.key), "damaged") is not None
            del self.manifests[name]
        elif of == "artifact":
            for digest in self.bad & entry.files.keys():
                path = self.vault.layout.artifact_file(digest)
                there = path.exists()
                assert (self.vault.quarantine(path, "damaged") is not None) is there

    @invariant()
    def what_is_whole_is_whole_and_the_rest_is_refused(self) -> None:
        for name, entry in self.entries.items():
            self.check(name, entry)

    def check(self, name: str, entry: Entry) -> None:
        state = self.manifests.get(name)
        if state is None:
            assert self.vault.lookup(entry.key) is None
        elif state == "damaged":
            with pytest.raises(CorruptEntryError):
                self.vault.lookup(entry.key)
        else:
            assert self.vault.lookup(entry.key) == entry.manifest
            for ref in entry.manifest.artifacts:
                if ref.digest in self.bad:
                    with pytest.raises(CorruptEntryError):
                        self.vault.verified_path(ref)
                else:
                    assert self.vault.verified_path(ref).read_bytes() == entry.files[ref.digest].read_bytes()

    @invariant()
    def pins_and_leases_are_those_of_the_model(self) -> None:
        assert pins(self.vault.layout) == {pin: self.entries[name].key for pin, name in self.pins.items()}
        assert live_leases(self.vault.layout).keys() == {
            self.entries[name].key for name, held in self.leases.items() if held
        }

    @invariant()
    def nothing_foreign_and_no_entry_that_was_not_published(self) -> None:
        assert list(iter_foreign(self.vault.layout)) == []
        assert {entry.key if hasattr(entry, "reason") else entry.key.digest for entry in self.vault.manifests()} == {
            self.entries[name].key for name in self.manifests
        }


TestVault = VaultMachine.TestCase
TestVault.settings = settings(stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow])
