"""A vault that was made without the weights of a model serves the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pipevault
from helpers.pipelines import FAST_BUILD, draw, stable_diffusion
from pipevault.opening import open_pipeline
from pipevault.store.vault import Vault


def libraries(root: Path) -> dict[str, list[str]]:
    graphs = (manifest for manifest in Vault.open(root).manifests() if manifest.key.kind == "graph")
    return {graph.info["signature_text"]: [ref.digest.hex for ref in graph.artifacts] for graph in graphs}


@pytest.mark.compile
def test_graphs_are_the_same_bytes_and_draw_the_same_picture(frozen_vault: Path, tmp_path: Path) -> None:
    real = stable_diffusion(tmp_path / "tokenizer")
    real.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.unlink()
    made = open_pipeline(str(tmp_path / "model"), device="cpu", with_weights=False)
    assert not torch.equal(made.unet.conv_in.weight, real.unet.conv_in.weight)
    pipevault.PipelineCache(tmp_path / "vault", build_config=FAST_BUILD, jobs=2).load(made, batch_size=1)
    assert libraries(tmp_path / "vault") == libraries(frozen_vault)

    other = stable_diffusion(tmp_path / "tokenizer")
    for pipe, vault in ((real, tmp_path / "vault"), (other, frozen_vault)):
        pipevault.PipelineCache(vault, mode="require", build_config=FAST_BUILD).load(pipe, batch_size=1)
        assert pipevault.outcome(pipe).status == "hit"
    assert torch.equal(draw(real), draw(other))
