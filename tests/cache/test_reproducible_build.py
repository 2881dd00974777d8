"""Two compilations of one key give the same bytes, so an artifact can be checked by making it again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipevault.store.manifest import Manifest
from pipevault.store.vault import Vault

pytestmark = pytest.mark.compile

COMPILE = """
import sys
from helpers.pipelines import FAST_BUILD, PlainPipeline
import pipevault
pipe = pipevault.PipelineCache(sys.argv[1], build_config=FAST_BUILD).load(PlainPipeline(seed=3), batch_size=1)
assert pipevault.outcome(pipe).status == "miss"
"""


def test_another_process_hash_seed_home_and_vault_give_the_same_artifacts(plain_vault: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "7", "HOME": str(tmp_path), "USER": "somebody"}
    subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path / "vault")],
        cwd=Path(__file__).parent.parent,
        env=environment,
        check=True,
    )
    ours, theirs = _entries(plain_vault), _entries(tmp_path / "vault")
    assert [entry.key.kind for entry in ours] == ["graph", "plan"]
    assert [entry.key for entry in ours] == [entry.key for entry in theirs]
    assert [entry.parts for entry in ours] == [entry.parts for entry in theirs]
    assert [entry.artifacts for entry in ours] == [entry.artifacts for entry in theirs]


def _entries(root: Path) -> list[Manifest]:
    entries = [entry for entry in Vault.open(root).manifests() if isinstance(entry, Manifest)]
    return sorted(entries, key=lambda entry: entry.key.kind)
