"""Every example, run as it is written: in a process of its own, on one vault, which the quickstart makes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pipevault

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"
SIX = ("quickstart", "shapes_and_ranges", "replay", "lora_or_finetune", "prewarm_and_require", "onediff_by_hand")


def run(code: list[str], folder: Path, vault: Path) -> str:
    """Return what a fresh Python prints that runs ``code`` in ``folder``."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(pipevault.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "PIPEVAULT_DIR": str(vault),
        "PIPEVAULT_COMPILE_PROFILE": "fast",
    }
    result = subprocess.run([sys.executable, *code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def example(name: str, folder: Path, vault: Path) -> list[str]:
    return run([str(EXAMPLES / f"{name}.py")], folder, vault).splitlines()


@pytest.fixture(scope="module")
def frozen_vault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vault of the examples, which the quickstart makes; next to it lies what that printed."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "printed").write_text("\n".join(example("quickstart", folder, folder / "vault")))
    return folder / "vault"


def test_the_quickstart_freezes_once_and_draws_the_same_bits(frozen_vault: Path, tmp_path: Path) -> None:
    printed = (frozen_vault.parent / "printed").read_text().splitlines()
    again = example("quickstart", tmp_path, frozen_vault)
    assert (printed[0], again[0]) == ("outcome: miss", "outcome: hit")
    assert printed[1] == again[1]
    assert re.fullmatch("pixels: [0-9a-f]{64}", again[1])
    assert pipevault.read_record(tmp_path / "seven.png").results["pixels"] == [again[1].removeprefix("pixels: ")]


def test_replay(frozen_vault: Path, tmp_path: Path) -> None:
    printed = example("replay", tmp_path, frozen_vault)
    assert printed[:2] == ["seed: 7 outcome: hit", "drawn again, equal: True"]
    assert printed[2].startswith("with other weights: ")
    assert "unet" in printed[2]


def test_a_fine_tune_and_a_lora_run_the_graphs_of_the_base_model(frozen_vault: Path, tmp_path: Path) -> None:
    before = sorted((frozen_vault / "entries").rglob("*.json"))
    base, tuned, fused = (line.split() for line in example("lora_or_finetune", tmp_path, frozen_vault))
    assert tuned[:2] == ["fine-tune:", "hit"]
    assert len({base[-1], tuned[-1], fused[-1]}) == 3
    assert sorted((frozen_vault / "entries").rglob("*.json")) == before


def test_prewarm_and_require(frozen_vault: Path, tmp_path: Path) -> None:
    printed = example("prewarm_and_require", tmp_path, frozen_vault)
    assert printed[1:3] == ["after: hit", "worker: hit"]
    assert printed[3].startswith("refused: ")
    assert "--batch-size 3" in " ".join(printed)


def test_shapes_and_ranges(frozen_vault: Path, tmp_path: Path) -> None:
    printed = example("shapes_and_ranges", tmp_path, frozen_vault)
    assert [line.split(", ")[0] for line in printed] == [
        "32x32: drawn",
        "32x48: drawn",
        "48x48: refused",
        "48x48: drawn",
        "64x40: drawn",
    ]
    graphs = [int(line.rpartition(" ")[2]) for line in printed if "drawn" in line]
    assert graphs == [2, 2, 3, 3]


def test_onediff_by_hand(frozen_vault: Path, tmp_path: Path) -> None:
    saved, equal = example("onediff_by_hand", tmp_path, frozen_vault)
    assert {"unet", "text_encoder"} <= {name.strip() for name in saved.removeprefix("saved:").split(",")}
    assert equal.startswith("equal bits: True")


def cells() -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_of(cell: dict[str, Any]) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"] if output.get("name") == "stdout")


def test_the_notebook_has_outputs_and_its_cells_run(frozen_vault: Path, tmp_path: Path) -> None:
    code = "\n".join("".join(cell["source"]) for cell in cells())
    kept = "".join(text_of(cell) for cell in cells())
    printed = run(["-c", code], tmp_path, frozen_vault)
    assert all(cell["outputs"] for cell in cells() if "print(" in "".join(cell["source"]))
    assert any("image/png" in output.get("data", {}) for cell in cells() for output in cell["outputs"])
    digest = re.compile("[0-9a-f]{64}")  # one for each type of machine
    assert digest.sub("…", printed) == digest.sub("…", kept)


def test_each_example_is_tested_and_shown_in_the_docs() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SIX, "server"}
    page = (ROOT / "docs" / "examples.md").read_text("utf-8")
    assert "``` { .python }" in page  # ruff formats what stands in a fence of plain python
    assert [name for name in SIX if f'--8<-- "examples/{name}.py"' not in page] == []
