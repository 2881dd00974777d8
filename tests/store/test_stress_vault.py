"""The stress script: every promise is kept in its short mode, and it notices where one is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from pipevault.digest import Digest
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.vault import Vault

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODULES = ("figures", "stress_entries", "stress_faults", "stress_limits", "stress_vault")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    import stress_vault

    yield stress_vault
    for name in MODULES:
        sys.modules.pop(name, None)


def broken(figures: list[Any]) -> list[str]:
    return [figure.name for figure in figures if figure.kept is False]


def test_the_short_mode_keeps_every_promise() -> None:
    command = [sys.executable, str(SCRIPTS / "stress_vault.py"), "--quick", "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = {figure["name"]: figure for figure in json.loads(result.stdout)}
    assert [name for name, figure in figures.items() if figure["kept"] is False] == []
    assert figures["compiles, 32 processes on one cold key"]["value"] == "1"
    for name in ("torn entries after kills", "stuck locks after kills", "published entries lost after kills"):
        assert (figures[name]["value"], figures[name]["kept"]) == ("0", True)
    assert figures["damages not noticed before the loader"]["value"] == "0"
    assert {"lookup, 1000 entries", "ls, again, 1000 entries", "prune --dry-run, 1000 entries"} <= figures.keys()
    limits = ("full disk", "read-only mount", "permission denied", "clock moved backwards")
    assert {figures[name]["value"] for name in limits} <= {"as promised", "not tried: this user may not mount"}


class TestItNotices:
    def test_a_lock_that_is_granted_to_all(self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def free(*arguments: object, **options: object) -> AbstractContextManager[None]:
            return nullcontext()

        monkeypatch.setattr(Vault, "lock", free)
        assert "compiles, 32 processes on one cold key" in broken(script.measure_race(tmp_path))

    def test_a_manifest_that_is_published_first(
        self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def publish(vault: Vault, manifest: Manifest, files: Mapping[Digest, Path]) -> Manifest:
            from pipevault.files.atomic import make_folder, write_file

            contents = {vault.layout.manifest_file(manifest.key.digest): manifest.to_bytes()}
            contents |= {vault.layout.artifact_file(digest): path.read_bytes() for digest, path in files.items()}
            for path, data in contents.items():
                make_folder(path.parent)
                write_file(path, data)
            return manifest

        monkeypatch.setattr(Vault, "publish", publish)
        figures = script.measure_kills(tmp_path, kills=30, seed=0)
        assert "torn entries after kills" in broken(figures)

    def test_a_lock_that_stays(self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        locked: list[Path] = []

        @contextmanager
        def lock(vault: Vault, key: Digest, *, timeout_s: float, on_wait: object = None) -> Iterator[None]:
            from pipevault.errors import LockTimeoutError

            place = tmp_path / f"{key}.locked"
            if place.exists():
                raise LockTimeoutError("It is locked.", key.hex, 0.0)
            place.touch()
            locked.append(place)
            yield
            place.unlink()

        monkeypatch.setattr(Vault, "lock", lock)
        figures = script.measure_kills(tmp_path / "work", kills=6, seed=0)
        assert "stuck locks after kills" in broken(figures)
        assert locked

    def test_artifacts_that_are_not_verified(
        self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def trusting(vault: Vault, ref: ArtifactRef) -> Path:
            return vault.owned_path(ref)

        monkeypatch.setattr(Vault, "verified_path", trusting)
        figures = script.measure_damages(tmp_path, damages=40, seed=0)
        assert "damages not noticed before the loader" in broken(figures)

    def test_a_crash_at_a_limit(self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: object) -> None:
            raise OSError("the disk is on fire")

        monkeypatch.setattr(Vault, "record_use", fail)
        assert "permission denied" in broken(script.measure_limits(tmp_path))


class TestOptions:
    def test_one_stage_as_a_table(self, script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert script.main(["--quick", "--only", "count", "--dir", str(tmp_path)]) == 0
        head, _, row = capsys.readouterr().out.splitlines()
        assert head == "| what | figure | goal |"
        assert row.startswith("| counting a hit | ")
        assert list(tmp_path.iterdir()) == []

    def test_a_broken_promise_is_the_exit_code(
        self, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        figures = [script.Figure("a", "1", "0", False), script.Figure("b", "2")]
        monkeypatch.setattr(script, "measure_all", lambda *_, **__: figures)
        assert script.main([]) == 1
        assert "| a | 1 **broken** | 0 |\n| b | 2 |  |" in capsys.readouterr().out

    def test_an_unknown_stage(self, script: Any) -> None:
        with pytest.raises(SystemExit) as caught:
            script.main(["--only", "lunch"])
        assert caught.value.code == 2
