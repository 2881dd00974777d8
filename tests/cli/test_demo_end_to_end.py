"""The command ``demo`` itself on the pipeline that ships, each run in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.compile


@dataclass(frozen=True)
class DemoVault:
    """A vault that one run of ``demo`` froze, and what that run printed and drew."""

    root: Path
    report: dict[str, Any]
    picture: Path


def pipevault(*arguments: str | Path, threads: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipevault", *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def report_of(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


@pytest.fixture(scope="module")
def demo_vault(tmp_path_factory: pytest.TempPathFactory) -> DemoVault:
    folder = tmp_path_factory.mktemp("demo")
    root, picture = folder / "vault", folder / "first.png"
    report = report_of(pipevault("demo", "--dir", root, "--out", picture, "--json"))
    return DemoVault(root, report, picture)


def test_the_first_run_is_a_miss_and_draws(demo_vault: DemoVault) -> None:
    assert list(demo_vault.report) == ["outcome", "key", "ready_s", "pixels_sha256", "picture", "parts"]
    assert demo_vault.report["outcome"] == "miss"
    frozen = {name for name, part in demo_vault.report["parts"].items() if part["status"] == "frozen"}
    assert {"unet", "vae.decoder", "text_encoder"} <= frozen
    with Image.open(demo_vault.picture) as picture:
        assert len(picture.getcolors(maxcolors=1 << 20) or []) > 100


def test_the_second_run_is_a_hit_with_the_same_pixels(demo_vault: DemoVault, tmp_path: Path) -> None:
    again = report_of(
        pipevault("demo", "--dir", demo_vault.root, "--mode", "require", "--out", tmp_path / "a.png", "--json")
    )
    assert again["outcome"] == "hit"
    assert again["key"] == demo_vault.report["key"]
    assert again["pixels_sha256"] == demo_vault.report["pixels_sha256"]
    assert (tmp_path / "a.png").read_bytes() == demo_vault.picture.read_bytes()


def test_another_thread_count_is_a_miss_that_explain_attributes_to_it(demo_vault: DemoVault) -> None:
    result = report_of(pipevault("explain", "demo", "--dir", demo_vault.root, "--json", threads=2))
    assert result["status"] == "miss"
    assert result["nearest"] == demo_vault.report["key"]
    assert [row["factor"] for row in result["differences"]] == ["machine.threads"]
    assert (result["differences"][0]["ours"], result["differences"][0]["theirs"]) == (2, 1)


def test_explain_makes_no_vault(tmp_path: Path) -> None:
    result = report_of(pipevault("explain", "demo", "--dir", tmp_path / "none", "--mode", "require", "--json"))
    assert (result["status"], result["load"]) == ("miss", "would be an error: mode is require")
    assert not (tmp_path / "none").exists()


def test_explain_of_the_same_call_is_a_hit(demo_vault: DemoVault) -> None:
    result = report_of(pipevault("explain", "demo", "--dir", demo_vault.root, "--json"))
    assert (result["status"], result["key"]) == ("hit", demo_vault.report["key"])


def test_prewarm_of_the_demo_finds_what_demo_froze(demo_vault: DemoVault) -> None:
    script = Path(__file__).resolve().parents[2] / "scripts" / "prewarm.py"
    command = [sys.executable, str(script), "demo", "--dir", str(demo_vault.root), "--json"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    document = report_of(subprocess.run(command, env=variables, capture_output=True, text=True))
    [result] = document["calls"]
    assert (result["status"], result["key"]) == ("hit", demo_vault.report["key"])


def test_ls_show_and_doctor_understand_a_real_entry(demo_vault: DemoVault, tmp_path: Path) -> None:
    root = shutil.copytree(demo_vault.root, tmp_path / "vault")
    listed = pipevault("ls", "--dir", root)
    assert "StableDiffusionPipeline" in listed.stdout
    assert "32x32, batch 10, guidance" in listed.stdout
    assert "UNet2DConditionModel" in listed.stdout
    shown = pipevault("show", demo_vault.report["key"][:10], "--dir", root)
    assert "frozen, 1 graph" in shown.stdout
    plan = json.loads(pipevault("show", demo_vault.report["key"], "--dir", root, "--json").stdout)
    graph = pipevault("show", plan["needs"][0], "--dir", root)
    assert "graph.so" in graph.stdout
    assert plan["kind"] == "plan"
    assert pipevault("doctor", "--dir", root).returncode == 0
