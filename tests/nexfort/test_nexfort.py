"""nexfort itself: what it compiled is kept, and restored in a fresh process before its first compilation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipevault.errors import UnusableBackendError

WORKER = Path(__file__).parent / "worker.py"


class Process:
    """Runs the worker with a C++ compiler that counts its calls."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.vault = folder / "vault"
        self.kind = kind
        self.folder = folder
        self.calls = folder / "compiler calls"
        self.calls.touch()
        self.compiler = folder / "g++"
        self.compiler.write_text(f'#!/bin/sh\necho "$@" >> \'{self.calls}\'\nexec {shutil.which("g++")} "$@"\n')
        self.compiler.chmod(0o755)

    def run(self, *more: str, temporary: Path | None = None, **settings: Any) -> dict[str, Any]:
        self.calls.write_text("")
        finished = self.start(temporary, settings, *more)
        assert finished.returncode == 0, finished.stderr[-4000:]
        result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
        lines = self.calls.read_text().splitlines()
        result["compiler_calls"] = [line for line in lines if line not in ("--version", "-v")]
        return result

    def start(self, temporary: Path | None, settings: dict[str, Any], *more: str) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "CXX": str(self.compiler), **({"TMPDIR": str(temporary)} if temporary else {})}
        command = [sys.executable, str(WORKER), str(self.vault), self.kind, json.dumps(settings), *more]
        return subprocess.run(command, env=environ, capture_output=True, text=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Process, dict[str, Any]]:
    process = Process(tmp_path_factory.mktemp("plain"), "plain")
    return process, process.run()


class TestPlainPipeline:
    def test_a_miss_compiles_and_keeps(self, plain: tuple[Process, dict[str, Any]]) -> None:
        _, first = plain
        assert (first["status"], first["parts"]) == ("miss", {"transformer": "frozen"})
        assert first["graphs"] >= 1
        assert first["compiler_calls"]
        assert first["distance"] < 1e-4
        assert first["eager_again"]

    def test_a_fresh_process_compiles_nothing_and_draws_the_same_bits(
        self, plain: tuple[Process, dict[str, Any]]
    ) -> None:
        process, first = plain
        again = process.run(mode="require")
        assert again["status"] == "hit"
        assert again["sha256"] == first["sha256"]
        assert (again["compiled"], again["files_added"], again["compiler_calls"]) == (0, [], [])
        assert again["said"] == []
        assert again["folder"] != first["folder"]
        assert not Path(again["folder"]).exists()  # it ends with the process

    def test_in_another_temporary_folder(self, plain: tuple[Process, dict[str, Any]], tmp_path: Path) -> None:
        process, first = plain
        moved = process.run(mode="require", temporary=tmp_path)
        assert moved["folder"].startswith(str(tmp_path))
        assert (moved["sha256"], moved["compiled"], moved["compiler_calls"]) == (first["sha256"], 0, [])

    def test_a_call_that_nothing_was_kept_for_is_told(self, plain: tuple[Process, dict[str, Any]]) -> None:
        process, _ = plain
        [said] = process.run("other call", mode="require")["said_of_another_call"]
        assert "graphs were compiled for calls that nothing was kept for" in said

    def test_the_mode_belongs_to_the_key(self, plain: tuple[Process, dict[str, Any]]) -> None:
        process, _ = plain
        finished = process.start(None, {"mode": "require", "build_config": {"mode": "max-autotune"}})
        assert finished.returncode != 0
        assert "MissError" in finished.stderr
        assert "backend.mode: 'O2:cache-all' in the vault, 'max-autotune:cache-all' here" in finished.stderr

    def test_a_damaged_archive_is_compiled_again(self, plain: tuple[Process, dict[str, Any]], tmp_path: Path) -> None:
        process, first = plain
        other = Process(tmp_path, "plain")
        shutil.copytree(process.vault, other.vault)
        [archive] = [path for path in (other.vault / "artifacts").rglob("*") if path.is_file()]
        archive.chmod(0o600)
        archive.write_bytes(archive.read_bytes()[:-1] + b"x")
        healed = other.run()
        assert healed["status"] == "miss"
        assert healed["sha256"] == first["sha256"]
        assert other.run(mode="require")["status"] == "hit"


def test_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    process = Process(tmp_path, "stable diffusion")
    first, again = process.run(), process.run(mode="require")
    assert (first["status"], again["status"]) == ("miss", "hit")
    assert first["sha256"] == again["sha256"]
    assert (again["compiled"], again["files_added"], again["compiler_calls"]) == (0, [], [])
    print(
        f"\na tiny UNet, CPU time: compiled in {first['load_s']:.0f} s; restored in {again['load_s']:.1f} s, "
        f"first call {again['first_call_s']:.1f} s"
    )


class TestBesideThisTorch:
    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "pipevault", *arguments], capture_output=True, text=True)

    def test_the_commands_of_the_vault(self, plain: tuple[Process, dict[str, Any]], tmp_path: Path) -> None:
        process, first = plain
        vault, bundle, key = str(process.vault), str(tmp_path / "entry.pvb"), first["key"][:12]
        for arguments in (
            ["ls", "--dir", vault],
            ["show", key, "--dir", vault],
            ["verify", "--dir", vault],
            ["stats", "--dir", vault],
            ["prune", "--dry-run", "--max-size", "1GB", "--dir", vault],
            ["pin", key, "--name", "prod", "--dir", vault],
            ["pins", "--dir", vault],
            ["unpin", "prod", "--dir", vault],
            ["export", key, "-o", bundle, "--dir", vault],
            ["import", bundle, "--dir", str(tmp_path / "other")],
            ["where"],
            ["doctor", "--dir", vault],
        ):
            finished = self.command(*arguments)
            assert finished.returncode == 0, (arguments, finished.stdout, finished.stderr)
        other = Process(tmp_path, "plain")
        shutil.move(tmp_path / "other", other.vault)
        assert other.run(mode="require")["sha256"] == first["sha256"]

    def test_doctor_says_what_this_torch_is_for(self) -> None:
        assert "for backend nexfort alone" in self.command("doctor").stdout

    def test_backend_inductor_says_what_it_needs(self, tmp_path: Path) -> None:
        import onediffx
        from torch import nn

        import pipevault

        with pytest.raises(UnusableBackendError, match=r"'inductor' needs torch 2\.9 or newer, and this is torch 2\.4"):
            pipevault.PipelineCache(tmp_path / "vault")
        with pytest.raises(UnusableBackendError, match="'inductor' needs torch"):
            onediffx.compile_pipe(type("Pipe", (), {"unet": nn.Linear(1, 1)})(), backend="inductor")
        finished = self.command("demo", "--dir", str(tmp_path / "vault"), "--out", str(tmp_path / "demo.png"))
        assert (finished.returncode, finished.stdout) == (2, "")
        assert "backend 'inductor' needs torch 2.9" in finished.stderr

    def test_strict_says_what_it_cannot_hold(self) -> None:
        import pipevault

        with pipevault.level("strict") as achieved:
            assert achieved.level != "strict"
        assert any("mkldnn_deterministic" in note for note in achieved.notes)
