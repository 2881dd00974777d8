"""Which runs a comparison makes, what they are compared with, and what it concludes; no process is started."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.comparison_runs import REQUEST, FakeRuns, brighter, compared
from pipevault.cache.outcome import Step
from pipevault.errors import (
    DifferentOutputError,
    MissingExtraError,
    NotComparableError,
    PipevaultError,
    SettingsError,
)
from pipevault.evidence.compare.run import RUNS
from pipevault.evidence.request import Request


def reason(comparison: Any, run: str) -> str:
    return dict(comparison.skipped)[run]


def test_every_method_runs_twice_and_each_cause_of_drift_once_in_this_order() -> None:
    runs = FakeRuns()
    comparison = compared(runs, dir=Path("vault"), dtype="bfloat16")
    assert [(run.plan.name, run.plan.against) for run in comparison.runs] == [
        ("eager", None),
        ("eager again", "eager"),
        ("torch.compile", "eager"),
        ("torch.compile again", "torch.compile"),
        ("frozen", "eager"),
        ("frozen again", "frozen"),
        ("eager, other thread count", "eager"),
        ("eager, other instruction set", "eager"),
        ("eager, other batch size", "eager"),
    ]
    assert comparison.skipped == ()
    assert {job.method for label, job in runs.jobs.items() if label.startswith("eager")} == {"eager"}
    assert runs.jobs["torch.compile again"].method == "torch.compile"
    assert {job.dtype for job in runs.jobs.values()} == {"bfloat16"}
    assert {job.dir for job in runs.jobs.values()} == {Path("vault")}
    assert {job.request.seed for job in runs.jobs.values()} == {7}


def test_the_vault_is_prewarmed_before_frozen_runs_which_may_then_not_compile() -> None:
    runs = FakeRuns()
    comparison = compared(runs, groups=("frozen",))
    assert list(runs.jobs) == ["eager", "prewarm", "frozen", "frozen again"]
    assert (runs.jobs["prewarm"].mode, runs.jobs["prewarm"].generations) == ("compile", 0)
    assert (runs.jobs["frozen"].mode, runs.jobs["frozen"].generations) == ("require", 2)
    assert comparison.prewarm is not None


def test_the_first_eager_run_is_made_even_if_only_others_were_asked_for() -> None:
    comparison = compared(groups=("batch",))
    assert [run.plan.name for run in comparison.runs] == ["eager", "eager, other batch size"]
    assert comparison.prewarm is None
    assert comparison.frozen_equal is None


def test_names_of_runs_are_unique_and_each_is_compared_with_an_earlier_one() -> None:
    names = [run.name for run in RUNS]
    assert len(set(names)) == len(names)
    assert [run for index, run in enumerate(RUNS) if run.against not in (None, *names[:index])] == []


@pytest.mark.parametrize(("base", "other"), [(1, "2"), (4, "1")])
def test_another_thread_count(base: int, other: str) -> None:
    runs = FakeRuns(base={"threads": base})
    comparison = compared(runs, groups=("threads",))
    environment = runs.jobs["eager, other thread count"].environment
    assert environment == {"OMP_NUM_THREADS": other, "MKL_NUM_THREADS": other}
    word = "thread" if other == "1" else "threads"
    assert comparison.run("eager, other thread count").note == f"{other} {word}, not {base}"


@pytest.mark.parametrize(("base", "below"), [("AVX512", "avx2"), ("AVX2", "default")])
def test_another_instruction_set(base: str, below: str) -> None:
    runs = FakeRuns(base={"capability": base})
    comparison = compared(runs, groups=("isa",))
    assert runs.jobs["eager, other instruction set"].environment == {"ATEN_CPU_CAPABILITY": below}
    assert comparison.run("eager, other instruction set").note == f"{below.upper()} kernels, not {base}"


def test_no_instruction_set_below() -> None:
    comparison = compared(FakeRuns(base={"capability": "DEFAULT"}), groups=("isa",))
    assert "less than DEFAULT" in reason(comparison, "eager, other instruction set")


@pytest.mark.parametrize("run", ["eager, other thread count", "eager, other instruction set"])
def test_a_gpu_does_not_depend_on_them(run: str) -> None:
    comparison = compared(FakeRuns(base={"device": "cuda"}))
    assert "cuda" in reason(comparison, run)
    assert comparison.run("eager, other batch size").equal


def test_a_change_that_had_no_effect_is_no_row() -> None:
    comparison = compared(FakeRuns(say=lambda label: {"threads": 1}), groups=("threads",))
    assert "no effect" in reason(comparison, "eager, other thread count")
    assert [run.plan.name for run in comparison.runs] == ["eager"]


@pytest.mark.parametrize(
    ("prompts", "other", "note"),
    [
        (("a cat", "a dog"), ("a cat",), "batch of 1, not 2"),
        (("a cat",), ("a cat", "a cat"), "batch of 2, not 1"),
    ],
)
def test_another_batch_size_compares_the_first_picture(
    prompts: tuple[str, ...], other: tuple[str, ...], note: str
) -> None:
    latents = lambda label, count: np.arange(count * 4, dtype=np.float32).reshape(count, 1, 2, 2)  # noqa: E731
    runs = FakeRuns(latents=latents)
    run = compared(runs, Request(prompts), groups=("batch",)).run("eager, other batch size")
    assert runs.jobs["eager, other batch size"].request.prompts == other
    assert (run.note, run.equal, run.same_noise) == (note, True, None)
    assert run.latents_distance is not None
    assert run.latents_distance.equal


def test_a_pipeline_without_prompts_has_no_other_batch() -> None:
    comparison = compared(FakeRuns(), Request(), groups=("batch",))
    assert "prompt" in reason(comparison, "eager, other batch size")


def test_distances_are_over_all_pictures() -> None:
    run = compared(FakeRuns(brighter("torch.compile", by=6)), groups=("torch.compile",)).run("torch.compile")
    assert run.equal is False
    assert run.pixels_distance is not None
    assert run.pixels_distance.differing_share == 1 / (2 * 64)
    assert run.pixels_distance.max_abs == 6
    assert run.pixels_distance.mean_abs == pytest.approx(6 / (2 * 64 * 3))
    assert run.pixels_distance.psnr_db == pytest.approx(10 * math.log10(255**2 / (36 / (2 * 64 * 3))))
    assert run.pixels_distance.ssim is not None
    assert run.pixels_distance.ssim < 1


def test_equal_runs_have_no_distance() -> None:
    run = compared(groups=("eager",)).run("eager again")
    assert run.equal
    assert run.pixels_distance is not None
    assert (run.pixels_distance.differing_share, run.pixels_distance.psnr_db) == (0, math.inf)


def test_latents_show_a_drift_that_rounding_hides() -> None:
    def latents(label: str, count: int) -> np.ndarray[Any, Any]:
        return np.full((count, 4, 2, 2), 0.001 if label == "eager, other thread count" else 0.0, np.float32)

    run = compared(FakeRuns(latents=latents), groups=("threads",)).run("eager, other thread count")
    assert run.equal
    assert run.latents_distance is not None
    assert run.latents_distance.max_abs == pytest.approx(0.001)


def test_other_noise_is_said() -> None:
    runs = FakeRuns(say=lambda label: {"noise": "other"} if label == "eager, other instruction set" else {})
    comparison = compared(runs)
    assert comparison.run("eager, other instruction set").same_noise is False
    assert comparison.run("eager again").same_noise is True


def test_frozen_runs_that_are_equal_keep_the_promise() -> None:
    comparison = compared(FakeRuns(brighter("eager again")))
    comparison.check()
    assert comparison.frozen_equal is True


def other_warm(label: str) -> dict[str, Any]:
    return {"warm_pixels": ("x", "y")} if label == "frozen" else {}


def other_latents(label: str, count: int) -> np.ndarray[Any, Any]:
    return np.full((count, 4, 2, 2), float(label == "frozen again"), np.float32)


@pytest.mark.parametrize(
    ("runs", "named"),
    [
        (FakeRuns(brighter("frozen again")), "frozen again differs from frozen"),
        (FakeRuns(say=other_warm), "the second generation of frozen"),
        (FakeRuns(latents=other_latents), "the latents of frozen again"),
    ],
)
def test_frozen_runs_that_differ_break_the_promise(runs: FakeRuns, named: str) -> None:
    comparison = compared(runs)
    assert comparison.frozen_equal is False
    with pytest.raises(DifferentOutputError, match=named) as caught:
        comparison.check()
    assert "seed 7" in str(caught.value)


def test_a_run_with_fewer_pictures() -> None:
    runs = FakeRuns(lambda label, pictures: pictures[:1] if label == "eager again" else pictures)
    with pytest.raises(NotComparableError, match="eager again gave 1 pictures and eager 2"):
        compared(runs)


def test_runs_that_give_nothing() -> None:
    with pytest.raises(NotComparableError, match="0 pictures"):
        compared(FakeRuns(lambda label, pictures: []))


def test_pictures_of_several_sizes() -> None:
    def draw(label: str, pictures: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        return [*pictures[:1], np.zeros((4, 8, 3), np.uint8)]

    with pytest.raises(NotComparableError, match="Give a size"):
        compared(FakeRuns(draw))


def test_an_unknown_run_is_refused_before_the_first() -> None:
    runs = FakeRuns()
    with pytest.raises(SettingsError, match=r"'fast'.*torch\.compile"):
        compared(runs, groups=("eager", "fast"))
    assert runs.jobs == {}


def test_without_scikit_image_it_says_so_before_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    runs = FakeRuns()
    with pytest.raises(MissingExtraError):
        compared(runs)
    assert runs.jobs == {}


def test_a_run_that_fails_ends_the_comparison() -> None:
    def failing(label: str) -> dict[str, Any]:
        if label == "frozen":
            raise PipevaultError("frozen failed")
        return {}

    runs = FakeRuns(say=failing)
    with pytest.raises(PipevaultError, match="frozen failed"):
        compared(runs)
    assert "frozen again" not in runs.jobs


def test_a_seed_that_is_drawn_is_the_same_in_all_runs() -> None:
    runs = FakeRuns()
    comparison = compared(runs, Request(("a cat",), seed=-1))
    assert comparison.request.seed >= 0
    assert {job.request.seed for job in runs.jobs.values()} == {comparison.request.seed}


def test_each_run_is_reported_as_it_begins_and_ends() -> None:
    steps: list[Step] = []
    compared(groups=("frozen",), progress=steps.append)
    assert [step.part for step in steps if step.seconds is None] == ["eager", "prewarm", "frozen", "frozen again"]
    assert len([step for step in steps if step.seconds is not None]) == 4


def test_the_document_is_plain_json() -> None:
    document = json.loads(json.dumps(compared(FakeRuns(brighter("frozen"))).to_json(), allow_nan=False))
    assert document["request"]["prompts"] == list(REQUEST.prompts)
    rows = {row["run"]: row for row in document["runs"]}
    assert rows["frozen"]["equal"] is False
    assert rows["frozen"]["pixels_distance"]["differing_share"] == 1 / 128
    assert rows["eager again"]["pixels_distance"]["psnr_db"] == "inf"
    assert rows["frozen"]["seconds"]["warm"] == 0.25
    assert document["frozen_equal"] is False
    assert document["skipped"] == []
