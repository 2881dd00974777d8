"""A model built from its configuration alone is, but for the values of its weights, the one that was saved."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from families.build import CI_FAMILIES, FAMILIES
from pipevault.compat.made_up_weights import made_up_parts
from pipevault.demo import MODEL_DIR
from pipevault.errors import SettingsError
from pipevault.fingerprint.model import architecture
from pipevault.graphs.observe import named_tensors
from pipevault.opening import DTYPES, open_pipeline


def modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def layout(module: nn.Module) -> dict[str, Any]:
    """Return dtype, shape and strides of each tensor that a graph may be bound to, and which of them are one."""
    first: dict[int, str] = {}
    return {
        name: (tensor.dtype, tensor.shape, tensor.stride(), first.setdefault(tensor.data_ptr(), name))
        for name, tensor in named_tensors(module)
        if tensor.numel()
    }


def without_weights(folder: Path) -> str:
    """Remove the weights, so that nothing can read them."""
    for file in (*folder.rglob("*.safetensors"), *folder.rglob("*.bin")):
        file.unlink()
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", CI_FAMILIES)
def test_keys_and_layouts_are_those_of_the_model_with_its_weights(name: str, tmp_path: Path) -> None:
    FAMILIES[name].make().save_pretrained(tmp_path)
    saved = {dtype: open_pipeline(str(tmp_path), dtype=dtype, device="cpu") for dtype in DTYPES}
    folder = without_weights(tmp_path)
    with pytest.raises(SettingsError):
        open_pipeline(folder, device="cpu")
    for dtype, real in saved.items():
        made = open_pipeline(folder, dtype=dtype, device="cpu", with_weights=False)
        assert type(made) is type(real)
        assert modules(made).keys() == modules(real).keys()
        for part, module in modules(real).items():
            other = modules(made)[part]
            assert architecture(other).digest == architecture(module).digest, (part, dtype)
            assert layout(other) == layout(module), (part, dtype)
            assert all(bool(torch.isfinite(tensor).all()) for _, tensor in named_tensors(other)), (part, dtype)


def test_the_values_are_the_same_each_time_and_leave_the_streams_alone() -> None:
    from diffusers import DiffusionPipeline

    state = torch.random.get_rng_state()
    first, second = (made_up_parts(DiffusionPipeline, str(MODEL_DIR), torch.float32)[1] for _ in range(2))
    assert first.keys() == {"unet", "vae", "text_encoder"}
    for name, module in first.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, second[name].state_dict()[key]), (name, key)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_code_that_a_model_brings_along_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(MODEL_DIR, model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "unet": ["brought_along", "Own"]}))
    (tmp_path / "brought_along.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SettingsError):
        open_pipeline(str(model), with_weights=False)
    assert not ran.exists()


def test_without_accelerate_models_are_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with_it = open_pipeline("demo", with_weights=False)
    assert layout(with_it.unet) == layout(open_pipeline("demo").unet)
