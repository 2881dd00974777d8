"""What a user may rely on around a load: later calls, other pipelines, undoing it, changes that matter or do not."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import pipevault
from helpers.pipelines import FAST_BUILD, PlainPipeline, draw, stable_diffusion
from pipevault.cache.loaded import FrozenPipeline, loaded_state
from pipevault.cache.outcome import PartOutcome
from pipevault.errors import (
    BadCallError,
    CannotFreezeError,
    ChangedPartError,
    MissError,
    SettingsError,
    UnfrozenCallError,
)
from pipevault.graphs.part import FrozenPart, part_state
from pipevault.store.vault import Vault


def cache(root: Path, mode: str = "require", **options: Any) -> pipevault.PipelineCache:
    return pipevault.PipelineCache(root, mode=mode, build_config=FAST_BUILD, **options)


@pytest.fixture
def vault_copy(plain_vault: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain_vault, tmp_path / "vault")


@pytest.fixture(scope="module")
def grown_vault(plain_vault: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds graphs of two sizes: the second was frozen on the spot, by a call, without a plan."""
    root = shutil.copytree(plain_vault, tmp_path_factory.mktemp("grown") / "vault")
    pipe = cache(root, "compile").load(PlainPipeline())
    draw(pipe, height=16)
    return root


@pytest.fixture
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr("pipevault.graphs.inductor.build_graph", refuse)


class TestCallsWithoutAGraph:
    def test_frozen_on_the_spot_with_the_bits_of_every_later_call(
        self, vault_copy: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        eager = draw(PlainPipeline(), height=24)
        pipe = cache(vault_copy, "compile").load(PlainPipeline())
        with caplog.at_level(logging.INFO, "pipevault"):
            first = draw(pipe, height=24)
        torch.testing.assert_close(first, eager)
        assert "freezing transformer for float32[1,24,8], float32[]" in caplog.text
        assert torch.equal(draw(pipe, height=24), first)
        other = cache(vault_copy).load(PlainPipeline())
        assert torch.equal(draw(other, height=24), first)
        state = loaded_state(pipe)
        assert state is not None
        assert state.states(pipe)["transformer"].uses["eager"] == 0
        assert pipevault.outcome(pipe).parts["transformer"].graphs == 2

    @pytest.mark.usefixtures("no_compiling")
    def test_an_error_in_mode_require_names_part_call_and_what_is_frozen(self, vault_copy: Path) -> None:
        pipe = cache(vault_copy).load(PlainPipeline())
        with pytest.raises(
            UnfrozenCallError, match=r"transformer[\s\S]*Called: float32\[1,24,8\][\s\S]*Frozen: float32"
        ):
            draw(pipe, height=24)

    @pytest.mark.usefixtures("no_compiling")
    def test_eager_is_told_once_and_shown_by_the_outcome(
        self, vault_copy: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        pipe = cache(vault_copy, on_unfrozen="eager").load(PlainPipeline())
        expected = draw(PlainPipeline(), height=24)
        with caplog.at_level(logging.WARNING, "pipevault"):
            assert torch.equal(draw(pipe, height=24), expected)
            draw(pipe, height=24)
        assert len([record for record in caplog.records if "runs eagerly" in record.getMessage()]) == 1
        part = pipevault.outcome(pipe).parts["transformer"]
        assert part.status == "eager"
        assert "on_unfrozen is 'eager'" in part.reason

    def test_a_call_that_cannot_be_frozen_counts_where_it_is_made(
        self, vault_copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*arguments: Any) -> None:
            raise CannotFreezeError("no graph can do it")

        monkeypatch.setattr("pipevault.graphs.inductor.build_graph", refuse)
        draw(cache(vault_copy, "compile").load(PlainPipeline()), height=24)
        without_a_shape = cache(vault_copy).load(PlainPipeline())
        for pipe in (without_a_shape, cache(vault_copy).load(PlainPipeline(), batch_size=1)):
            assert pipevault.status(pipe).parts["transformer"] == PartOutcome("frozen", "", 1)
            draw(pipe)
            assert pipevault.status(pipe).parts["transformer"] == PartOutcome("frozen", "", 1)
            draw(pipe, height=24)
            assert pipevault.status(pipe).parts["transformer"] == PartOutcome("eager", "no graph can do it", 1)

    def test_background_serves_eagerly_and_then_by_the_graph(self, vault_copy: Path) -> None:
        from pipevault.cache import background

        pipe = cache(vault_copy, "compile", on_unfrozen="background").load(PlainPipeline())
        eager = draw(PlainPipeline(), height=40)
        assert torch.equal(draw(pipe, height=40), eager)
        assert "in the background" in pipevault.outcome(pipe).parts["transformer"].reason
        assert background._running is not None
        background._running.process.wait(240)
        frozen = draw(pipe, height=40)
        torch.testing.assert_close(frozen, eager)
        assert pipevault.outcome(pipe).parts["transformer"].status == "frozen"
        assert torch.equal(draw(cache(vault_copy).load(PlainPipeline()), height=40), frozen)

    def test_background_without_a_process_stays_eager_with_the_reason(
        self, vault_copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError("no more processes")

        monkeypatch.setattr("pipevault.cache.background.subprocess.Popen", fail)
        pipe = cache(vault_copy, "compile", on_unfrozen="background").load(PlainPipeline())
        assert torch.equal(draw(pipe, height=48), draw(PlainPipeline(), height=48))
        assert "no more processes" in pipevault.outcome(pipe).parts["transformer"].reason

    def test_policies_that_compile_do_not_go_with_require(self, tmp_path: Path) -> None:
        for policy in ("compile", "background"):
            with pytest.raises(SettingsError, match="mode 'require' never does"):
                cache(tmp_path, on_unfrozen=policy)

    @pytest.mark.usefixtures("no_compiling")
    def test_what_the_pipeline_refuses_is_its_own_error(self, vault_copy: Path) -> None:
        class Picky(PlainPipeline):
            def __call__(self, prompt: str | list[str] = "", height: int = 8, *args: Any, **kwargs: Any) -> Any:
                if height > 8:
                    raise ValueError("height is too large for this model")
                return super().__call__(prompt, height, *args, **kwargs)

        pipe = cache(vault_copy).load(Picky())
        with pytest.raises(ValueError, match="height is too large") as caught:
            pipe(height=16)
        assert not isinstance(caught.value, BadCallError)


@pytest.mark.compile
def test_a_module_inside_a_part_is_frozen_when_it_is_asked_for(tmp_path: Path) -> None:
    pipe = cache(tmp_path / "vault", "compile").load(PlainPipeline(), parts=["transformer.mix"], batch_size=1)
    assert pipevault.outcome(pipe).parts["transformer.mix"].status == "frozen"
    torch.testing.assert_close(draw(pipe), draw(PlainPipeline()))
    state = loaded_state(pipe)
    assert state is not None
    assert state.states(pipe)["transformer.mix"].uses["eager"] == 0
    assert pipevault.record_of(draw(pipe)).graphs.keys() == {"transformer.mix"}


@pytest.mark.usefixtures("no_compiling")
class TestLoadsThatAdd:
    def test_a_call_that_any_pipeline_froze_is_a_hit_without_a_plan(self, grown_vault: Path) -> None:
        class AnotherPipeline(PlainPipeline):
            pass

        pipe = cache(grown_vault).load(AnotherPipeline(), height=16)
        assert pipevault.outcome(pipe).status == "hit"
        torch.testing.assert_close(draw(pipe, height=16), draw(PlainPipeline(), height=16))

    def test_the_first_size_is_that_of_calls_which_give_none(self, grown_vault: Path) -> None:
        pipe = cache(grown_vault).load(PlainPipeline(), height=16)
        assert pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(1)).shape == (1, 16, 8)
        cache(grown_vault).load(pipe, height=8)
        assert pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(1)).shape == (1, 16, 8)
        assert draw(pipe, height=8).shape == (1, 8, 8)

    def test_a_second_load_adds_to_the_first(self, grown_vault: Path) -> None:
        pipe = cache(grown_vault).load(PlainPipeline(), height=8)
        part = pipe.transformer
        cache(grown_vault).load(pipe, height=16)
        assert pipe.transformer is part
        draw(pipe, height=8)
        draw(pipe, height=16)
        assert part_state(part).uses["eager"] == 0

    def test_require_without_any_graph_is_a_miss_at_once(self, tmp_path: Path) -> None:
        Vault.open(tmp_path / "vault")
        with pytest.raises(MissError, match="no usable graphs for PlainPipeline"):
            cache(tmp_path / "vault").load(PlainPipeline())

    def test_a_load_without_a_shape_whose_inputs_cannot_be_made_up_says_what_will_happen(self, tmp_path: Path) -> None:
        class Needy(PlainPipeline):
            def __call__(self, poses: torch.Tensor, **options: Any) -> torch.Tensor:  # type: ignore[override]
                return super().__call__(**options)

        outcome = pipevault.outcome(cache(tmp_path / "vault", "compile").load(Needy()))
        assert outcome.status == "miss"
        assert "frozen as they come" in outcome.reason


@pytest.mark.usefixtures("no_compiling")
class TestTheUsersPipeline:
    @pytest.fixture
    def pipe(self, tmp_path: Path) -> Any:
        return stable_diffusion(tmp_path / "tokenizer")

    def test_unload_gives_everything_back(self, frozen_vault: Path, pipe: Any) -> None:
        modules = dict(pipe.components)
        eager, before = draw(pipe), set(vars(pipe))
        cache(frozen_vault).load(pipe, batch_size=1)
        draw(pipe)
        assert pipevault.unload(pipe) is pipe
        assert type(pipe) is StableDiffusionPipeline
        assert all(pipe.components[name] is value for name, value in modules.items())
        assert type(pipe.vae.decoder).__mro__.count(FrozenPart) == 0
        assert torch.equal(draw(pipe), eager)
        assert set(vars(pipe)) == before
        pipevault.unload(pipe)

    def test_a_load_leaves_scheduler_and_attributes_as_they_were(self, frozen_vault: Path, pipe: Any) -> None:
        vault = shutil.copytree(frozen_vault, frozen_vault.parent / "rehearsed", dirs_exist_ok=True)
        for manifest in Vault.open(vault).manifests():
            if manifest.key.kind == "plan":
                Vault.open(vault).layout.manifest_file(manifest.key.digest).unlink()
        scheduler, attributes = copy.deepcopy(vars(pipe.scheduler)), set(vars(pipe))
        torch.manual_seed(3)
        random_state = torch.get_rng_state()
        cache(vault).load(pipe, batch_size=1)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert vars(pipe.scheduler).keys() == scheduler.keys()
        assert pipe.scheduler.num_inference_steps == scheduler["num_inference_steps"]
        assert set(vars(pipe)) - attributes == {"_pipevault"}

    def test_a_pickle_a_copy_and_a_deep_copy_are_eager(self, frozen_vault: Path, pipe: Any) -> None:
        eager = draw(pipe)
        cache(frozen_vault).load(pipe)
        for again in (pickle.loads(pickle.dumps(pipe)), copy.copy(pipe), copy.deepcopy(pipe)):
            assert type(again) is StableDiffusionPipeline
            assert not isinstance(again.unet, FrozenPart)
            again.set_progress_bar_config(disable=True)
            if again.vae is not pipe.vae:  # a shallow copy shares its VAE, whose decoder stays frozen
                assert torch.equal(draw(again), eager)
        assert isinstance(pipe, FrozenPipeline)

    def test_shared_parts_serve_both_pipelines_in_any_order(self, frozen_vault: Path, pipe: Any) -> None:
        other = StableDiffusionPipeline.from_pipe(pipe)
        eager = draw(pipe)
        cache(frozen_vault).load(other)
        cache(frozen_vault).load(pipe)
        frozen = draw(pipe)
        assert torch.equal(draw(other), frozen)
        pipevault.unload(pipe)
        assert torch.equal(draw(other), frozen)
        pipevault.unload(other)
        assert torch.equal(draw(pipe), eager)
        assert torch.equal(draw(other), eager)

    def test_a_dropped_pipeline_is_freed(self, plain_vault: Path) -> None:
        pipe = cache(plain_vault).load(PlainPipeline())
        draw(pipe)
        part, weights = weakref.ref(pipe.transformer), pipe.transformer.mix.weight.untyped_storage()._weak_ref()
        del pipe
        gc.collect()
        assert part() is None
        assert torch.UntypedStorage._expired(weights), "their data, not the tensor object alone"

    def test_a_part_that_torch_compiled_stays_eager_and_the_others_freeze(self, frozen_vault: Path, pipe: Any) -> None:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        cache(frozen_vault).load(pipe)
        parts = pipevault.outcome(pipe).parts
        assert parts["text_encoder"].status == "frozen"
        assert parts["unet"].status == "eager"
        assert "torch.compile" in parts["unet"].reason


@pytest.mark.usefixtures("no_compiling")
class TestChanges:
    @pytest.fixture
    def pipe(self, vault_copy: Path) -> Any:
        pipe = cache(vault_copy).load(PlainPipeline())
        draw(pipe)
        return pipe

    def test_a_new_attribute_that_changes_nothing_is_accepted_after_one_comparison(self, pipe: Any) -> None:
        before = draw(pipe)
        pipe.transformer.mix.note = "checked by hand"
        assert torch.equal(draw(pipe), before)
        uses = part_state(pipe.transformer).uses["frozen"]
        assert torch.equal(draw(pipe), before)
        assert part_state(pipe.transformer).uses["frozen"] == uses + 3

    def test_one_that_changes_the_output_is_an_error_that_names_it(self, vault_copy: Path) -> None:
        pipe = PlainPipeline()
        pipe.transformer = Scaled()
        with pytest.raises(MissError):
            cache(vault_copy).load(pipe)

    def test_what_a_model_fills_itself_is_no_change(self, pipe: Any) -> None:
        before = draw(pipe)
        pipe.transformer.freqs = torch.ones(3)
        pipe.transformer.cache = {}
        assert torch.equal(draw(pipe), before)

    def test_a_hook_with_a_forward_is_an_error(self, pipe: Any) -> None:
        pipe.transformer.mix.register_forward_hook(lambda module, args, output: output * 2)
        with pytest.raises(ChangedPartError, match="hook"):
            draw(pipe)

    def test_a_part_called_outside_of_a_generation_is_guarded_too(self, pipe: Any) -> None:
        step = torch.tensor(0.0)
        with torch.no_grad():
            expected = pipe.transformer(torch.ones(1, 8, 8), step)
        assert expected.shape == (1, 8, 8)
        pipe.transformer.mix.register_forward_hook(lambda module, args, output: output * 2)
        with pytest.raises(ChangedPartError), torch.no_grad():
            pipe.transformer(torch.ones(1, 8, 8), step)

    def test_gradients_are_refused_with_the_way_out(self, pipe: Any) -> None:
        with pytest.raises(CannotFreezeError, match=r"requires_grad_\(False\)"):
            pipe.transformer(torch.ones(1, 8, 8), torch.tensor(0.0))


class Scaled(torch.nn.Module):
    """Another module than the one that was frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(8, 8)

    def forward(self, latents: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return self.mix(latents) * step


def test_the_key_is_the_same_under_another_hash_seed_and_after_other_work(plain_vault: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, pipevault\n"
        "from helpers.pipelines import FAST_BUILD, PlainPipeline, draw\n"
        "pipe = PlainPipeline(); draw(pipe); torch.manual_seed(9); draw(PlainPipeline(seed=3), height=16)\n"
        "print(pipevault.PipelineCache(sys.argv[2], build_config=FAST_BUILD).key(pipe).digest.hex)\n"
    )
    import os

    arguments = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(plain_vault)]
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    finished = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    expected = cache(plain_vault).key(PlainPipeline()).digest.hex
    assert finished.stdout.split()[-1] == expected


class TestLogLine:
    """A load logs one line, at level INFO: status, parts and seconds."""

    def line(self, cache: pipevault.PipelineCache, caplog: pytest.LogCaptureFixture) -> str:
        with caplog.at_level(logging.INFO, "pipevault"):
            cache.load(PlainPipeline())
        [record] = [record for record in caplog.records if record.getMessage().startswith("loaded ")]
        assert (record.name, record.levelname) == ("pipevault", "INFO")
        return record.getMessage()

    @pytest.mark.usefixtures("no_compiling")
    def test_of_a_hit(self, plain_vault: Path, caplog: pytest.LogCaptureFixture) -> None:
        line = self.line(cache(plain_vault), caplog)
        assert re.fullmatch(r"loaded PlainPipeline: hit in \d+\.\d\d s; frozen: transformer; eager: none", line)

    def test_of_mode_off(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        line = self.line(cache(tmp_path, "off"), caplog)
        assert re.fullmatch(r"loaded PlainPipeline: off in \d+\.\d\d s; frozen: none; eager: none", line)
