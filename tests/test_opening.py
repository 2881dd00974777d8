"""Opening a model never runs code that the model brings along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipevault.demo import MODEL_DIR
from pipevault.errors import SettingsError
from pipevault.opening import open_pipeline


@pytest.mark.parametrize(
    ("field", "value", "file"),
    [
        ("_class_name", ["brought_along", "Own"], "brought_along.py"),
        ("unet", ["brought_along", "Own"], "unet/brought_along.py"),
    ],
)
@pytest.mark.parametrize("pipeline_class", [None, "StableDiffusionPipeline"])
def test_code_in_a_folder_is_not_run(
    tmp_path: Path, field: str, value: list[str], file: str, pipeline_class: str | None
) -> None:
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(MODEL_DIR, model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, field: value}))
    (model / file).write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom diffusers import StableDiffusionPipeline as Own\n"
    )
    with pytest.raises(SettingsError, match="contains custom code"):
        open_pipeline(str(model), pipeline_class=pipeline_class)
    assert not ran.exists()


def test_nothing_is_fetched_for_a_record() -> None:
    with pytest.raises(SettingsError, match="not in the local cache of the hub, and nothing is fetched for a record"):
        open_pipeline("pipevault-test/no-such-model", local_only=True)


@pytest.mark.parametrize("name", ["nosuch", "DiffusionPipeline.mro", "utils", "__path__", "UNet2DModel"])
def test_a_class_that_is_no_pipeline_of_diffusers(name: str) -> None:
    with pytest.raises(SettingsError, match="has no pipeline class"):
        open_pipeline("demo", pipeline_class=name)
