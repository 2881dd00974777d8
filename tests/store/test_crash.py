"""A process that dies between any two changes of the file system, and a disk that fills up at any of them."""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import pipevault.store
from helpers.fault_steps import (
    CHANGING_CALLS,
    GROWING_CALLS,
    disk_full,
    killed_at_each_step,
    strike_at,
    uncounted_changes,
)
from helpers.mounts import in_child
from helpers.store_entries import Entry, leftovers, make_entry, make_graph, make_plan, whole
from pipevault.errors import CorruptEntryError, VaultFullError
from pipevault.files.flock import HeldLock, try_lock
from pipevault.store.check import verify
from pipevault.store.locks import lock as lock_module
from pipevault.store.locks.lock import read_holder
from pipevault.store.places import iter_foreign
from pipevault.store.retention.leftovers import sweep
from pipevault.store.vault import Vault

SHARED = b"shared" * 500
HARMLESS = frozenset(
    {
        *(
            "access",
            "devnull",
            "fstat",
            "listdir",
            "lstat",
            "path",
            "read",
            "readlink",
            "scandir",
            "stat",
            "stat_result",
            "walk",
        ),
        *("close", "environ", "fsencode", "fspath", "geteuid", "getpid", "getuid", "kill", "name", "sep", "urandom"),
        *("register_at_fork", "fdopen", "makedirs", "getegid", "getgroups"),
    }
)
"""What the store uses of ``os`` that changes no file itself: ``fdopen`` writes what ``open`` opened, ``makedirs`` calls
``mkdir``.
"""
OPERATIONS = ("create", "publish", "heal", "quarantine", "lock", "take over", "remove", "sweep")


@pytest.fixture
def new(tmp_path: Path) -> Entry:
    return make_entry(tmp_path / "source", "new", {"unet/0.pt2": SHARED, "vae/0.pt2": b"own" * 999})


@pytest.fixture
def old(vault: Vault, tmp_path: Path) -> Entry:
    """An entry that is in the vault already and shares an artifact with ``new``."""
    old = make_entry(tmp_path / "source", "old", {"unet/0.pt2": SHARED})
    vault.publish(old.manifest, old.files)
    return old


def copy_of(vault: Vault, folder: Path) -> Vault:
    return Vault.open(shutil.copytree(vault.root, folder))


def test_killed_while_publishing(vault: Vault, old: Entry, new: Entry, tmp_path: Path) -> None:
    target = tmp_path / "target"
    copy_of(vault, target)
    outcomes = []
    for _ in killed_at_each_step(lambda: Vault.open(target).publish(new.manifest, new.files)):
        survivor = Vault.open(target)
        outcomes.append(whole(survivor, new.manifest))
        assert whole(survivor, old.manifest)
        assert list(iter_foreign(survivor.layout)) == []
        survivor.publish(new.manifest, new.files)
        assert whole(survivor, new.manifest)
        shutil.rmtree(target)
        copy_of(vault, target)
    assert outcomes == sorted(outcomes)
    assert outcomes[0] is False
    assert outcomes[-1] is True
    assert len(outcomes) > 20


def test_what_a_killed_publisher_leaves_is_swept(vault: Vault, old: Entry, new: Entry, tmp_path: Path) -> None:
    """After each step: its staging folder goes, everything else stays."""
    for _ in killed_at_each_step(lambda: vault.publish(new.manifest, new.files)):
        swept = sweep(vault.layout, temporary_dir=tmp_path / "none")
        assert leftovers(vault) == []
        assert all(vault.layout.is_staging(item.path) for item in swept)
        assert whole(vault, old.manifest)
        if vault.lookup(new.key) is not None:
            assert whole(vault, new.manifest)
            vault.layout.manifest_file(new.key).unlink()
    assert sweep(vault.layout, temporary_dir=tmp_path / "none") == []


def test_killed_while_creating_a_vault(tmp_path: Path) -> None:
    root = tmp_path / "vault"
    for _ in killed_at_each_step(lambda: Vault.open(root)):
        assert list(iter_foreign(Vault.open(root).layout)) == []
        shutil.rmtree(root)


@pytest.mark.parametrize("damage", ["artifact", "manifest", "missing artifact"])
def test_killed_while_healing(vault: Vault, new: Entry, tmp_path: Path, damage: str) -> None:
    vault.publish(new.manifest, new.files)
    path = {
        "artifact": vault.layout.artifact_file(new.manifest.artifacts[0].digest),
        "manifest": vault.layout.manifest_file(new.key),
        "missing artifact": vault.layout.artifact_file(new.manifest.artifacts[1].digest),
    }[damage]
    path.unlink()
    if damage != "missing artifact":
        path.write_bytes(b"damaged")
    target = tmp_path / "target"
    copy_of(vault, target)
    for _ in killed_at_each_step(lambda: Vault.open(target).publish(new.manifest, new.files)):
        survivor = Vault.open(target)
        with suppress(CorruptEntryError):  # the old damage, still noticed
            whole(survivor, new.manifest)
        assert list(iter_foreign(survivor.layout)) == []
        survivor.publish(new.manifest, new.files)
        assert whole(survivor, new.manifest)
        shutil.rmtree(target)
        copy_of(vault, target)


def test_killed_while_removing(vault: Vault, old: Entry, new: Entry, tmp_path: Path) -> None:
    vault.publish(new.manifest, new.files)
    target = tmp_path / "target"
    copy_of(vault, target)

    def remove() -> None:
        opened = Vault.open(target)
        opened.remove(opened.plan_removal([new.key]))

    for _ in killed_at_each_step(remove):
        survivor = Vault.open(target)
        assert whole(survivor, old.manifest)
        assert whole(survivor, new.manifest) or survivor.lookup(new.key) is None
        shutil.rmtree(target)
        copy_of(vault, target)


def test_killed_while_removing_a_plan_with_its_graphs(vault: Vault, old: Entry, tmp_path: Path) -> None:
    graph, shared = (make_graph(tmp_path / "source", part, "1") for part in ("unet", "vae"))
    plan = make_plan(tmp_path / "source", "plan", graph, shared)
    staying = make_plan(tmp_path / "source", "staying", shared)
    for entry in (graph, shared, plan, staying):
        vault.publish(entry.manifest, entry.files)
    target = tmp_path / "target"
    copy_of(vault, target)

    def remove() -> None:
        opened = Vault.open(target)
        opened.remove(opened.plan_removal([plan.key], with_needed=True))

    for _ in killed_at_each_step(remove):
        survivor = Vault.open(target)
        assert all(whole(survivor, entry.manifest) for entry in (old, shared, staying))
        for entry in (plan, graph):
            assert whole(survivor, entry.manifest) or survivor.lookup(entry.key) is None
        assert verify(survivor).bad == ()
        for entry in (graph, plan):
            survivor.publish(entry.manifest, entry.files)
            assert whole(survivor, entry.manifest)
        shutil.rmtree(target)
        copy_of(vault, target)


def test_killed_while_holding_the_lock(vault: Vault, new: Entry) -> None:
    def hold_and_publish() -> None:
        with vault.lock(new.key, timeout_s=0):
            vault.publish(new.manifest, new.files)

    for _ in killed_at_each_step(hold_and_publish):
        with vault.lock(new.key, timeout_s=0):
            assert vault.lookup(new.key) in (None, new.manifest)
        assert list(iter_foreign(vault.layout)) == []


@pytest.fixture
def dead_note(vault: Vault, new: Entry) -> bytes:
    """The note of a process that ended with the lock of ``new``."""

    def hold() -> None:
        vault.layout.locks_dir.mkdir()
        lock_module._leave_note(vault.layout, new.key)

    assert in_child(hold) == 0
    return vault.layout.holder_file(new.key).read_bytes()


def test_killed_while_taking_over(vault: Vault, new: Entry, dead_note: bytes, tmp_path: Path) -> None:
    """The lock file stays locked; wherever a taker dies, the next process gets the lock all the same, and alone."""

    def take_over() -> None:
        with vault.lock(new.key, timeout_s=0):
            pass

    lock, note = vault.layout.lock_file(new.key), vault.layout.holder_file(new.key)
    steps = []
    inherited = try_lock(lock)
    assert isinstance(inherited, HeldLock)
    for step in killed_at_each_step(take_over):
        steps.append(step)
        with vault.lock(new.key, timeout_s=0):
            assert not inherited.is_current()
            assert read_holder(note) is not None
        sweep(vault.layout, temporary_dir=tmp_path / "none")
        assert leftovers(vault) == []
        assert list(iter_foreign(vault.layout)) == []
        inherited.release()
        again = try_lock(lock)
        assert isinstance(again, HeldLock)
        inherited = again
        note.write_bytes(dead_note)
    inherited.release()
    assert len(steps) > 10


def test_killed_while_quarantining(vault: Vault, old: Entry, tmp_path: Path) -> None:
    path = vault.layout.manifest_file(old.key)
    data = path.read_bytes()
    for _ in killed_at_each_step(lambda: vault.quarantine(path, "damaged")):
        places = [path, *vault.layout.quarantine_dir.glob("*.json")]
        assert [place.read_bytes() for place in places if place.exists()] == [data]
        assert list(iter_foreign(vault.layout)) == []
        sweep(vault.layout, temporary_dir=tmp_path / "none")
        assert leftovers(vault) == []
        shutil.rmtree(vault.layout.quarantine_dir, ignore_errors=True)
        path.write_bytes(data)


def leave_everything(vault: Vault, key: Entry, temporary: Path) -> None:
    """End with a staging folder, a lock with its note, and a folder in ``temporary``."""
    vault.layout.locks_dir.mkdir(exist_ok=True)
    with vault.staging() as staging:
        (staging / "file").write_bytes(b"x")
        lock_module._leave_note(vault.layout, key.key)
        vault.layout.lock_file(key.key).touch()
        (temporary / f"pipevault.freeze.{os.getpid():032x}" / "inside").mkdir(parents=True, exist_ok=True)
        os._exit(0)


def test_killed_while_sweeping(vault: Vault, old: Entry, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    assert in_child(lambda: leave_everything(vault, old, temporary)) == 0
    steps = []
    for step in killed_at_each_step(lambda: sweep(vault.layout, temporary_dir=temporary)):
        steps.append(step)
        assert whole(vault, old.manifest)
        assert list(iter_foreign(vault.layout)) == []
        with vault.lock(old.key, timeout_s=0):
            pass
        assert in_child(lambda: leave_everything(vault, old, temporary)) == 0
    assert len(steps) > 5
    sweep(vault.layout, temporary_dir=temporary)
    assert leftovers(vault) == list(temporary.iterdir()) == list(vault.layout.locks_dir.iterdir()) == []


def operations(vault: Vault, old: Entry, new: Entry) -> dict[str, Callable[[], object]]:
    """What each of :data:`OPERATIONS` does, ready to run."""

    def lock() -> None:
        with vault.lock(new.key, timeout_s=0):
            pass

    def take_over() -> None:
        inherited = try_lock(vault.layout.lock_file(new.key))
        assert isinstance(inherited, HeldLock)
        lock()
        assert not inherited.is_current()

    def heal() -> None:
        path = vault.layout.artifact_file(old.manifest.artifacts[0].digest)
        os.unlink(path)
        vault.publish(new.manifest, new.files)

    return {
        "create": lambda: Vault.open(vault.root.with_name("created")),
        "publish": lambda: vault.publish(new.manifest, new.files),
        "heal": heal,
        "quarantine": lambda: vault.quarantine(vault.layout.manifest_file(old.key), "damaged"),
        "lock": lock,
        "take over": take_over,
        "remove": lambda: vault.remove(vault.plan_removal([old.key])),
        "sweep": lambda: sweep(vault.layout, temporary_dir=vault.root.parent / "temporary"),
    }


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_change_of_the_file_system_is_a_step(
    vault: Vault, old: Entry, new: Entry, dead_note: bytes, tmp_path: Path, name: str
) -> None:
    """What the tests above strike at is all there is: the interpreter reports no other change."""
    assert dead_note  # for taking over
    if name == "sweep":
        assert in_child(lambda: leave_everything(vault, old, tmp_path / "temporary")) == 0
    assert uncounted_changes(operations(vault, old, new)[name]) == 0


@pytest.mark.parametrize(
    "path", sorted(Path(pipevault.store.__file__).parent.rglob("*.py")), ids=lambda path: path.name
)
def test_the_store_uses_nothing_of_os_that_is_not_known(path: Path) -> None:
    """A call that changes files and that the interpreter does not report, such as ``os.pwrite``, must be known here."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "os"]
    used = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
    }
    unknown = {name for name in used - HARMLESS - set(CHANGING_CALLS) if name.islower()}
    assert unknown == set(), "add them to CHANGING_CALLS of fault_steps.py, or to HARMLESS if they change no file"


def test_a_disk_that_fills_up_at_any_step(vault: Vault, old: Entry, new: Entry, tmp_path: Path) -> None:
    for step in range(1000):
        target = copy_of(vault, tmp_path / f"target{step}")
        with suppress(VaultFullError), strike_at(step, disk_full, GROWING_CALLS):
            target.publish(new.manifest, new.files)
            assert whole(target, new.manifest)
            assert step > 10
            return
        assert leftovers(target) == []
        assert whole(target, old.manifest)
        assert whole(target, new.manifest) or target.lookup(new.key) is None
        target.publish(new.manifest, new.files)
        assert whole(target, new.manifest)
        shutil.rmtree(target.root)
    pytest.fail("it never got through")


def test_a_full_disk_does_not_stop_quarantine_from_getting_out_of_the_way(vault: Vault, old: Entry) -> None:
    path = vault.layout.artifact_file(old.manifest.artifacts[0].digest)
    vault.layout.quarantine_dir.mkdir()
    with strike_at(0, disk_full, ("mkdir", "open", "write")):
        moved = vault.quarantine(path, "damaged")
    assert moved is not None
    assert not path.exists()
    with strike_at(0, disk_full, GROWING_CALLS):
        assert vault.quarantine(vault.layout.manifest_file(old.key), "damaged") is None
    assert vault.layout.manifest_file(old.key).exists()
