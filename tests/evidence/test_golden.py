"""Suites with a real frozen pipeline: record, check, drift."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import pipevault
from helpers.pipelines import FAST_BUILD, stable_diffusion
from pipevault.errors import (
    BadCallError,
    ChangedWeightsError,
    DifferentOutputError,
    MissError,
    NoGoldenError,
    PipevaultError,
    SettingsError,
)
from pipevault.evidence.golden import drift as golden_drift
from pipevault.evidence.golden.check import Passed
from pipevault.evidence.golden.drawn import seen_latents
from pipevault.evidence.golden.drift import MARGIN, SMALLEST, causes, measure_tolerances, tolerance_of
from pipevault.evidence.golden.files import read_golden
from pipevault.evidence.golden.run import SuiteRunner, check_suite, record_suite
from pipevault.evidence.golden.suite_file import read_suite
from pipevault.key import Key

SUITE = """pipevault_suite = 1
model = "model"
device = "cpu"
[[case]]
name = "cat"
prompt = "a cat"
seed = 7
steps = 2
[[case]]
name = "dog"
prompt = "a dog"
seed = 8
steps = 2
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    stable_diffusion(folder / "tokenizer").save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def suite(model: Path, tmp_path: Path) -> Path:
    (tmp_path / "model").symlink_to(model)
    path = tmp_path / "suite.toml"
    path.write_text(SUITE)
    return path


@pytest.fixture
def recorded(suite: Path, frozen_vault: Path) -> Path:
    list(record_suite(runner(suite, frozen_vault)))
    return suite


def runner(suite: Path, vault: Path, **options: Any) -> SuiteRunner:
    return SuiteRunner(read_suite(suite), **{"dir": vault, "mode": "require", "build_config": FAST_BUILD, **options})


def results(suite: Path, vault: Path, **options: Any) -> dict[str, Any]:
    """The status or the error of each case."""
    checked = check_suite(runner(suite, vault), **options)
    return {case: result.status if isinstance(result, Passed) else result for case, result in checked}


def test_what_was_recorded_comes_out_again(recorded: Path, frozen_vault: Path) -> None:
    assert results(recorded, frozen_vault) == {"cat": "equal", "dog": "equal"}
    assert not recorded.with_name("suite.failures").exists()


def test_a_golden_holds_pictures_latents_and_the_record(suite: Path, frozen_vault: Path) -> None:
    [golden] = record_suite(runner(suite, frozen_vault), names=("cat",))
    assert golden.path.parent.parent == suite.with_suffix(".goldens")
    assert sorted(path.name for path in golden.path.iterdir()) == ["0.png", "golden.json", "latents.safetensors"]
    document = json.loads((golden.path / "golden.json").read_text("utf-8"))
    assert document["request"] == read_suite(suite).cases[0].request.to_json()
    assert document["latents"] == [document["record"]["results"]["latents"]]
    assert document["samples"] == document["record"]["results"]["pixels"]
    factors = document["factors"]
    assert Key(factors).digest.hex == document["record"]["key"]
    assert pipevault.read_record(golden.path / "0.png").key == document["record"]["key"]


def test_another_seed_fails_with_pictures_and_the_other_cases_are_checked(recorded: Path, frozen_vault: Path) -> None:
    recorded.write_text(SUITE.replace("seed = 7", "seed = 9"))
    found = results(recorded, frozen_vault)
    assert isinstance(found["cat"], DifferentOutputError)
    assert "call.seed: 7 in the golden, 9 here" in str(found["cat"])
    assert found["dog"] == "equal"
    folder = recorded.parent / "suite.failures" / "cat"
    assert sorted(path.name for path in folder.iterdir()) == ["actual.png", "difference.png", "expected.png"]


def test_pictures_go_where_they_are_asked_for(recorded: Path, frozen_vault: Path, tmp_path: Path) -> None:
    recorded.write_text(SUITE.replace("seed = 7", "seed = 9"))
    results(recorded, frozen_vault, out=tmp_path / "out")
    assert (tmp_path / "out" / "cat" / "difference.png").is_file()


def test_changed_weights_are_named(recorded: Path, model: Path, frozen_vault: Path, tmp_path: Path) -> None:
    (tmp_path / "model").unlink()
    pipe = stable_diffusion(tmp_path / "tokenizer")
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.25
    pipe.save_pretrained(tmp_path / "model")
    error = results(recorded, frozen_vault, names=("cat",))["cat"]
    assert isinstance(error, ChangedWeightsError)
    assert error.parts == ("unet",)


def test_a_case_that_was_never_recorded(suite: Path, frozen_vault: Path) -> None:
    list(record_suite(runner(suite, frozen_vault), names=("dog",)))
    found = results(suite, frozen_vault)
    assert isinstance(found["cat"], NoGoldenError)
    assert found["dog"] == "equal"


def test_a_call_that_the_pipeline_does_not_take_is_the_error_of_its_case(recorded: Path, frozen_vault: Path) -> None:
    recorded.write_text(SUITE + "arguments = { colour = 3 }\n")
    found = results(recorded, frozen_vault)
    assert found["cat"] == "equal"
    assert isinstance(found["dog"], BadCallError)


def test_goldens_are_not_recorded_anew_by_accident(recorded: Path, frozen_vault: Path) -> None:
    with pytest.raises(SettingsError, match=r"cat, dog.*--overwrite"):
        list(record_suite(runner(recorded, frozen_vault)))
    assert len(list(record_suite(runner(recorded, frozen_vault), overwrite=True))) == 2


def test_a_case_of_another_shape_is_drawn_by_a_pipeline_of_its_own(suite: Path, frozen_vault: Path) -> None:
    suite.write_text(SUITE + "guidance_scale = 1.0\n")
    found = list(check_suite(runner(suite, frozen_vault, mode="require")))
    assert all(isinstance(result, NoGoldenError) for _, result in found)
    with pytest.raises(MissError):
        list(record_suite(runner(suite, frozen_vault)))


def test_after_a_load_that_failed_the_next_case_is_loaded(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline that was not loaded takes no seed, and draws what eager code draws."""
    suite.write_text(SUITE + "guidance_scale = 1.0\n")
    made = runner(suite, tmp_path / "vault")
    loaded: list[object] = []

    def load(pipe: object, **shape: object) -> None:
        if "guidance" in shape:
            raise MissError("There is none.", "ab", "no entry")
        loaded.append(pipe)

    monkeypatch.setattr(made._cache, "load", load)
    first, other = made.suite.cases
    made._load(first)
    with pytest.raises(MissError):
        made._load(other)
    assert made._load(first) is loaded[-1]


def test_goldens_need_frozen_graphs(suite: Path, frozen_vault: Path) -> None:
    with pytest.raises(SettingsError, match="off"):
        runner(suite, frozen_vault, mode="off")


def test_the_hook_that_sees_latents_is_gone_afterwards(frozen_vault: Path, suite: Path) -> None:
    pipe = stable_diffusion(suite.parent / "tokenizer")
    with seen_latents(pipe) as seen:
        pipe.vae.decoder(torch.zeros(1, 4, 8, 8))
    pipe.vae.decoder(torch.zeros(1, 4, 8, 8))
    assert [array.shape for array in seen] == [(1, 4, 8, 8)]


class TestDrift:
    def test_causes_of_a_cpu(self) -> None:
        assert causes({"type": "cpu", "threads": 1, "capability": "AVX512"}) == {
            "eager": {},
            "eager, 2 threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
            "eager, avx2 kernels": {"ATEN_CPU_CAPABILITY": "avx2"},
        }
        assert list(causes({"type": "cpu", "threads": 4, "capability": "DEFAULT"})) == ["eager", "eager, 1 thread"]
        assert list(causes({"type": "cuda"})) == ["eager"]

    def test_measured_in_a_fresh_process(
        self, suite: Path, frozen_vault: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(golden_drift, "causes", lambda _: {"eager, 2 threads": {"OMP_NUM_THREADS": "2"}})
        goldens = list(record_suite(runner(suite, frozen_vault), measure=True))
        assert goldens
        for golden in goldens:
            tolerance = read_golden(golden.path).tolerance
            assert tolerance is not None
            assert tolerance == golden.tolerance
            measured = tolerance.measured["eager, 2 threads"]
            assert 0 < measured["latents"]["max_abs"] < 1e-3
            assert measured["pixels"]["max_abs"] <= 2
            assert tolerance.limits.latents_max_abs == max(
                MARGIN * measured["latents"]["max_abs"], SMALLEST.latents_max_abs
            )

    def test_a_process_that_fails_is_an_error_with_what_it_printed(self, recorded: Path, frozen_vault: Path) -> None:
        drawn = {"cat": read_golden(next(recorded.with_suffix(".goldens").glob("*/cat"))).drawn}
        shutil.rmtree(recorded.with_suffix(".goldens"))
        recorded.write_text(SUITE.replace('model = "model"', 'model = "./nothing"'))
        with pytest.raises(PipevaultError, match=r"for 'eager' failed: The folder \./nothing does not exist"):
            measure_tolerances(read_suite(recorded), drawn)

    def test_limits_are_those_of_the_worst_cause_with_the_margin(self) -> None:
        from pipevault.evidence.metrics import Distance

        def apart(by: float) -> Distance:
            return Distance(1.0, by, by / 10, 30.0, None)

        tolerance = tolerance_of({"a": {"pixels": apart(10), "latents": apart(0.0)}, "b": {"pixels": apart(20)}})
        assert tolerance.limits.pixels_max_abs == 40
        assert tolerance.limits.pixels_mean_abs == 4
        assert tolerance.limits.latents_max_abs == SMALLEST.latents_max_abs

    def test_without_latents_there_is_no_limit_for_them(self) -> None:
        from pipevault.evidence.metrics import distance

        equal = distance(torch.zeros(2, 2).numpy(), torch.zeros(2, 2).numpy())
        assert tolerance_of({"eager": {"pixels": equal}}).limits.latents_max_abs is None
