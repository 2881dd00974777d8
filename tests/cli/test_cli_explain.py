"""``explain`` with the real cache, the pipeline that ships, and made-up entries in a real vault."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.command_runner import Run
from pipevault import PipelineCache
from pipevault.cli import explain
from pipevault.cli.pipelines import DEMO_SHAPE
from pipevault.key import Key
from pipevault.opening import open_pipeline
from pipevault.store.manifest import Manifest
from pipevault.store.vault import Vault

FROZEN = {"status": "frozen", "reason": "", "graphs": []}
EAGER = {"status": "eager", "reason": "it keeps state", "graphs": []}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return open_pipeline("demo")


@pytest.fixture(autouse=True)
def _opened_once(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    monkeypatch.setattr(explain, "open_pipeline", lambda model, **options: pipe)


def key_of(pipe: Any, **shape: Any) -> Key:
    return PipelineCache("unused").key(pipe, **{**DEMO_SHAPE, **shape})


def publish(root: Path, key: Key, **parts: Mapping[str, Any]) -> None:
    Vault.open(root).publish(Manifest(key, parts, (), {}, "2025-01-31T12:00:00+00:00"), {})


def document(run: Run, *arguments: str | Path) -> dict[str, Any]:
    result = run("explain", "demo", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


class TestMiss:
    def test_nothing_is_there_yet(self, run: Run, pipe: Any, tmp_path: Path) -> None:
        root = tmp_path / "vault"
        assert document(run, "--dir", root) == {
            "status": "miss",
            "reason": f"found no vault at {root}",
            "mode": "compile",
            "load": "would compile and store an entry",
            "key": key_of(pipe).digest.hex,
            "vault": str(root),
            "tier": "",
            "problems": [],
            "parts": {},
            "nearest": None,
            "differences": [],
        }
        assert not root.exists()

    def test_each_factor_that_differs_is_named(self, run: Run, pipe: Any, tmp_path: Path) -> None:
        ours = key_of(pipe)
        theirs = {**ours.factors, "machine": {**ours.factors["machine"], "threads": 77}}
        publish(tmp_path, Key(theirs), unet=FROZEN)
        found = document(run, "--dir", tmp_path)
        assert found["nearest"] == Key(theirs).digest.hex
        threads = ours.factors["machine"]["threads"]
        assert found["differences"] == [{"factor": "machine.threads", "ours": threads, "theirs": 77}]
        text = run("explain", "demo", "--dir", tmp_path).stdout
        assert re.search(rf"nearest entry +{Key(theirs).digest.short}\n", text)
        assert re.search(rf"machine\.threads +{threads} +77\n", text)

    def test_in_mode_require_it_would_be_an_error(self, run: Run, tmp_path: Path) -> None:
        assert document(run, "--dir", tmp_path, "--mode", "require")["load"] == "would be an error: mode is require"

    def test_of_a_vault_that_cannot_be_written(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        vault = Vault.open(tmp_path / "vault")
        monkeypatch.setattr(Vault, "of", lambda settings, **options: replace(vault, writable=False))
        load = document(run, "--dir", vault.root)["load"]
        assert load == "would be an error: the vault cannot be written, and on_unfrozen is 'compile'"
        monkeypatch.setenv("PIPEVAULT_ON_UNFROZEN", "eager")
        assert "cannot be written" not in document(run, "--dir", vault.root)["load"]


class TestHit:
    def test_all_called_parts_are_frozen(self, run: Run, pipe: Any, tmp_path: Path) -> None:
        publish(tmp_path, key_of(pipe), unet=FROZEN, **{"vae.encoder": {**FROZEN, "status": "not called"}})
        found = document(run, "--dir", tmp_path, "--mode", "require")
        assert (found["status"], found["load"], found["tier"]) == ("hit", "would load the entry", str(tmp_path))
        assert found["parts"]["unet"] == {"status": "frozen", "reason": "", "graphs": 0, "regions": ""}

    def test_with_an_eager_part_it_is_partial_and_says_why(self, run: Run, pipe: Any, tmp_path: Path) -> None:
        publish(tmp_path, key_of(pipe), unet=FROZEN, **{"vae.decoder": EAGER})
        found = document(run, "--dir", tmp_path)
        assert found["status"] == "partial"
        assert found["reason"] == f"{key_of(pipe).digest.short} is in the vault; vae.decoder: it keeps state"
        assert found["load"] == "would load the entry; some parts would run eagerly"

    def test_tier_and_problems(self, run: Run, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        publish(tmp_path / "shared", key_of(pipe), unet=FROZEN)
        (tmp_path / "old").write_text("a file")
        monkeypatch.setenv("PIPEVAULT_TIERS", f"{tmp_path / 'old'}:{tmp_path / 'shared'}")
        found = document(run, "--dir", tmp_path / "own")
        assert (found["status"], found["tier"]) == ("hit", str(tmp_path / "shared"))
        assert any(str(tmp_path / "old") in problem for problem in found["problems"])
        text = run("explain", "demo", "--dir", tmp_path / "own").stdout
        assert re.search(rf"tier +{tmp_path / 'shared'}\n", text)
        assert re.search(r"problem +.*old", text)

    def test_mode_off_would_do_nothing(self, run: Run, pipe: Any, tmp_path: Path) -> None:
        publish(tmp_path, key_of(pipe), unet=FROZEN)
        assert document(run, "--dir", tmp_path, "--mode", "off")["load"].startswith("would leave the pipeline as it is")


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "shape"),
        [
            ([], {}),
            (["--size", "64x32"], {"width": 64, "height": 32}),
            (["--size", "32x32..64x32"], {"width": (32, 64), "height": 32}),
            (["--batch-size", "2", "--no-guidance"], {"batch_size": 2, "guidance": False}),
            (["--batch-size", "2..4"], {"batch_size": (2, 4)}),
            (["--parts", "unet, vae.decoder"], {"parts": ("unet", "vae.decoder")}),
            (["--parts", "unet", "--parts", "text_encoder"], {"parts": ("unet", "text_encoder")}),
            (["--parts", "auto"], {"parts": "auto"}),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_they_become_the_call(
        self, run: Run, pipe: Any, tmp_path: Path, options: list[str], shape: dict[str, Any]
    ) -> None:
        assert document(run, "--dir", tmp_path, *options)["key"] == key_of(pipe, **shape).digest.hex

    def test_weights_and_level_change_the_key(self, run: Run, tmp_path: Path) -> None:
        keys = {
            document(run, "--dir", tmp_path, *options)["key"]
            for options in ([], ["--weights", "baked"], ["--level", "strict"])
        }
        assert len(keys) == 3

    @pytest.mark.parametrize("names", ["", ",", "unet,,vae"])
    def test_a_part_without_a_name(self, run: Run, names: str) -> None:
        result = run("explain", "m", "--parts", names)
        assert (result.exit_code, "Empty name in --parts" in result.stderr) == (2, True)

    def test_a_size_that_is_none(self, run: Run) -> None:
        result = run("explain", "demo", "--size", "big")
        assert result.exit_code == 2
        assert "Invalid size 'big': expected WIDTHxHEIGHT, for example 768x512." in result.stderr

    @pytest.mark.parametrize("option", ["--batch-size", "--frames"])
    def test_numbers_below_one(self, run: Run, option: str) -> None:
        assert run("explain", "demo", option, "0").exit_code == 2
