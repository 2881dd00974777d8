"""Two compilations of one key give the same bytes, so an artifact can be checked by making it again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipevault.store.manifest import Manifest
from pipevault.store.vault import Vault

pytestmark = pytest.mark.compile

COMPILE = """
import sys
from helpers.pipelines import FAST_BUILD, PlainPipeline
import pipevault
pipe = pipevault.PipelineCache(sys.argv[1], build_config=FAST_BUILD).load(
    PlainPipeline(seed=int(sys.argv[2])), batch_size=5, height=24
)
assert pipevault.outcome(pipe).status == "miss"
"""


def test_another_process_hash_seed_home_and_vault_give_the_same_artifacts(tmp_path: Path) -> None:
    """At a size that no other test has: what two compile at once is not byte-identical, and says so."""
    ours = _compiled(tmp_path / "ours", 0, os.environ)
    theirs = _compiled(
        tmp_path / "theirs", 3, {**os.environ, "PYTHONHASHSEED": "7", "HOME": str(tmp_path), "USER": "somebody"}
    )
    assert [entry.key.kind for entry in ours] == ["graph", "plan"]
    assert [entry.key for entry in ours] == [entry.key for entry in theirs]
    assert [_without_checks(entry.parts) for entry in ours] == [_without_checks(entry.parts) for entry in theirs]
    assert [entry.artifacts for entry in ours] == [entry.artifacts for entry in theirs]


def _without_checks(parts: Any) -> Any:
    """How far a graph is from eager code depends on the weights."""
    plain = json.loads(json.dumps(parts, default=dict))
    for part in plain.values():
        for graph in part["graphs"]:
            if isinstance(graph, dict):  # in a plan they are keys
                assert graph.pop("checks")["calls"] == 2
    return plain


def _compiled(root: Path, seed: int, environment: Mapping[str, str]) -> list[Manifest]:
    subprocess.run(
        [sys.executable, "-c", COMPILE, str(root), str(seed)],
        cwd=Path(__file__).parent.parent,
        env=environment,
        check=True,
    )
    entries = [entry for entry in Vault.open(root).manifests() if isinstance(entry, Manifest)]
    return sorted(entries, key=lambda entry: entry.key.kind)
