"""Digests of weights in records: computed once, remembered across processes, never stale."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from helpers.pipelines import PlainPipeline
from pipevault.fingerprint.weights import weights_digest
from pipevault.graphs.parts import find_parts
from pipevault.runtime import recorded_weights
from pipevault.runtime.recorded_weights import ORIGINS, RecordedWeights, memory_file, note_origins, weights_origin


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Every module whose weights are hashed."""
    seen: list[nn.Module] = []

    def digest(module: nn.Module) -> str:
        seen.append(module)
        return weights_digest(module)

    monkeypatch.setattr(recorded_weights, "weights_digest", digest)
    return seen


def test_weights_are_hashed_once_until_they_move(hashed: list[nn.Module]) -> None:
    pipe, weights = PlainPipeline(), RecordedWeights()
    first = weights.digests(find_parts(pipe))
    assert first == {"transformer": weights_digest(pipe.transformer)}
    assert weights.digests(find_parts(pipe)) == first
    assert len(hashed) == 1
    pipe.transformer.mix.weight.data.mul_(2)
    assert weights.digests(find_parts(pipe)) != first
    assert len(hashed) == 2


def test_weights_that_cannot_be_read_are_left_out() -> None:
    pipe = PlainPipeline()
    pipe.transformer.to("meta")
    assert RecordedWeights().digests(find_parts(pipe)) == {}


class TestAhead:
    """What another thread hashes while the generation draws."""

    def test_is_what_the_record_holds(self, hashed: list[nn.Module]) -> None:
        pipe, weights = PlainPipeline(), RecordedWeights()
        weights.begin(find_parts(pipe))
        weights.begin(find_parts(pipe))
        assert weights.digests(find_parts(pipe)) == {"transformer": weights_digest(pipe.transformer)}
        weights.begin(find_parts(pipe))
        assert len(hashed) == 1

    @pytest.mark.parametrize("as_data", [False, True])
    def test_is_dropped_where_weights_moved_meanwhile(self, hashed: list[nn.Module], as_data: bool) -> None:
        pipe, weights = PlainPipeline(), RecordedWeights()
        weights.begin(find_parts(pipe))
        with torch.no_grad():
            weight = pipe.transformer.mix.weight
            (weight.data if as_data else weight).mul_(2)
        assert weights.digests(find_parts(pipe)) == {"transformer": weights_digest(pipe.transformer)}
        assert len(hashed) == 2

    def test_is_dropped_for_another_module(self) -> None:
        pipe, other, weights = PlainPipeline(), PlainPipeline(), RecordedWeights()
        other.transformer.mix.weight.data.mul_(2)
        weights.begin(find_parts(pipe))
        assert weights.digests(find_parts(other)) == {"transformer": weights_digest(other.transformer)}

    def test_that_failed_is_computed_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe, weights = PlainPipeline(), RecordedWeights()
        main = threading.current_thread()

        def digest(module: nn.Module) -> str:
            if threading.current_thread() is not main:
                raise RuntimeError("dictionary changed size during iteration")
            return weights_digest(module)

        monkeypatch.setattr(recorded_weights, "weights_digest", digest)
        weights.begin(find_parts(pipe))
        assert weights.digests(find_parts(pipe)) == {"transformer": weights_digest(pipe.transformer)}

    def test_of_a_fork_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe, weights = PlainPipeline(), RecordedWeights()
        monkeypatch.setattr(threading.Thread, "start", lambda self: None)  # as in a fork, which has this thread alone
        weights.begin(find_parts(pipe))
        child = os.fork()
        if child == 0:
            found = weights.digests(find_parts(pipe))
            os._exit(0 if found == {"transformer": weights_digest(pipe.transformer)} else 1)
        assert os.waitpid(child, 0)[1] == 0

    def test_leaves_a_device_to_the_generation(self, hashed: list[nn.Module]) -> None:
        pipe, weights = PlainPipeline(), RecordedWeights()
        pipe.transformer.to("meta")
        weights.begin(find_parts(pipe))
        assert weights.digests(find_parts(pipe)) == {}
        assert len(hashed) == 1


class TestOrigin:
    @pytest.fixture
    def make(self, tmp_path: Path) -> Callable[..., Any]:
        """A pipeline as diffusers opens it from ``folder``."""

        def make(folder: Path, **options: Any) -> Any:
            pipe = PlainPipeline()
            pipe.transformer.config = SimpleNamespace(_name_or_path=str(folder))
            note_origins(pipe, options)
            return pipe

        return make

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "model" / "transformer"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        return folder

    def digests(self, pipe: Any) -> dict[str, str]:
        return RecordedWeights(vars(pipe)[ORIGINS]).digests(find_parts(pipe))

    def test_another_process_hashes_nothing(
        self, make: Callable[..., Any], folder: Path, hashed: list[nn.Module]
    ) -> None:
        first = self.digests(make(folder))
        assert self.digests(make(folder)) == first
        assert len(hashed) == 1

    def test_weights_changed_after_opening_are_hashed(
        self, make: Callable[..., Any], folder: Path, hashed: list[nn.Module]
    ) -> None:
        first = self.digests(make(folder))
        pipe = make(folder)
        pipe.transformer.mix.weight.data.mul_(2)
        assert self.digests(pipe) != first
        assert self.digests(make(folder)) == first

    def test_other_files_or_options_are_another_origin(self, make: Callable[..., Any], folder: Path) -> None:
        def origin(**options: Any) -> str | None:
            return weights_origin(make(folder).transformer, options)

        first = origin()
        assert origin() == first
        assert origin(torch_dtype=torch.float16) != first
        assert origin(variant="fp16") != first
        (folder / "model.safetensors").write_bytes(b"other weights")
        assert origin() != first

    def test_files_of_the_hub_cache_go_by_their_digest_wherever_it_lies(self, tmp_path: Path) -> None:
        origins = []
        for place, blob in (("here", "a" * 64), ("there", "a" * 64), ("other", "b" * 64)):
            blobs, snapshot = tmp_path / place / "blobs", tmp_path / place / "snapshots" / "1" / "unet"
            blobs.mkdir(parents=True)
            snapshot.mkdir(parents=True)
            (blobs / blob).write_bytes(place.encode())
            (snapshot / "model.safetensors").symlink_to(blobs / blob)
            component = SimpleNamespace(config=SimpleNamespace(_name_or_path=str(snapshot)))
            origins.append(weights_origin(component, {}))
        assert origins[0] == origins[1] != origins[2]

    @pytest.mark.parametrize("options", [{"quantization_config": object()}, {"unet": nn.Linear(1, 1)}])
    def test_no_origin_where_options_can_hold_anything(
        self, make: Callable[..., Any], folder: Path, options: dict[str, Any]
    ) -> None:
        assert weights_origin(make(folder).transformer, options) is None

    def test_no_origin_without_a_folder(self, make: Callable[..., Any], tmp_path: Path) -> None:
        assert weights_origin(make(tmp_path / "absent").transformer, {}) is None
        assert weights_origin(nn.Linear(1, 1), {}) is None

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"pipevault_weights": 2, "sha256": "' + "a" * 64 + '"}', "{"])
    def test_a_memory_that_is_none_is_written_anew(
        self, make: Callable[..., Any], folder: Path, hashed: list[nn.Module], text: str
    ) -> None:
        pipe = make(folder)
        file = memory_file(vars(pipe)[ORIGINS]["transformer"][0], "transformer")
        file.parent.mkdir(parents=True)
        file.write_text(text)
        first = self.digests(pipe)
        assert json.loads(file.read_bytes())["sha256"] == first["transformer"]
        assert len(hashed) == 1

    def test_a_cache_folder_that_cannot_be_written_costs_time_only(
        self, make: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert self.digests(make(folder))


def test_the_one_line_form_notes_origins(tmp_path: Path) -> None:
    import pipevault
    from helpers.pipelines import stable_diffusion

    stable_diffusion(tmp_path / "tokenizer").save_pretrained(tmp_path / "model")
    from diffusers import StableDiffusionPipeline

    pipe = pipevault.from_pretrained(StableDiffusionPipeline, tmp_path / "model", mode="off", dir=tmp_path / "vault")
    assert set(vars(pipe)[ORIGINS]) == {"unet", "vae.decoder", "vae.encoder", "text_encoder"}
    with torch.no_grad():
        assert RecordedWeights(vars(pipe)[ORIGINS]).digests(find_parts(pipe))["unet"] == weights_digest(pipe.unet)
