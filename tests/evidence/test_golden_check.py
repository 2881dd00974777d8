"""Holding a run to its golden: what passes, what fails, what a failure says and leaves behind."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pipevault
from helpers.golden_runs import KEY, MACHINE, MANIFEST, OTHER_KEY, WEIGHTS, a_golden, a_run, brighter, picture
from pipevault.errors import (
    ChangedWeightsError,
    DifferentOutputError,
    NoGoldenError,
    OtherMachineError,
    PipevaultError,
)
from pipevault.evidence.golden.check import Passed, Rules, check_drawn, find_golden
from pipevault.evidence.golden.drawn import Drawn, machine_type
from pipevault.evidence.golden.files import Golden, Tolerance, write_golden
from pipevault.evidence.golden.suite_file import Limits

TWO_THREADS = {**MACHINE, "threads": 2}
TOLERANCE = Tolerance(
    Limits(pixels_max_abs=3, pixels_mean_abs=0.1, latents_max_abs=0.01, latents_mean_abs=0.01), 2.0, {}
)
ALLOWED = Rules(other_machine=True, other_key=True)


@pytest.fixture
def goldens(tmp_path: Path) -> Path:
    return tmp_path / "suite.goldens"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "failures" / "seven"


def written(goldens: Path, drawn: Drawn | None = None, **options: Any) -> Golden:
    golden = a_golden(goldens, drawn, **options)
    write_golden(golden)
    return find_golden(goldens, "seven", golden.record.machine, Rules())


def failure(golden: Golden, drawn: Drawn, out: Path, rules: Rules | None = None) -> PipevaultError:
    with pytest.raises(DifferentOutputError) as caught:
        check_drawn(golden, drawn, rules or Rules(), out=out)
    return caught.value


class TestSameKey:
    def test_equal_bytes_pass(self, goldens: Path, out: Path) -> None:
        golden = written(goldens)
        assert check_drawn(golden, a_run(), Rules(), out=out) == Passed(golden.path, "equal")
        assert not out.exists()

    def test_one_step_in_one_pixel_fails_whatever_is_allowed(self, goldens: Path, out: Path) -> None:
        golden = written(goldens, tolerance=TOLERANCE)
        error = failure(golden, a_run(brighter(picture(), 1)), out, ALLOWED)
        assert "1 of 1 samples differ, 0.5% of the pixels, by 1 at most" in str(error)
        assert "The key is the same" in str(error)

    def test_a_failure_leaves_the_three_pictures(self, goldens: Path, out: Path) -> None:
        golden, actual = written(goldens), brighter(picture(), 4)
        error = failure(golden, a_run(actual), out)
        assert str(out) in str(error)
        assert sorted(path.name for path in out.iterdir()) == ["actual.png", "difference.png", "expected.png"]
        shown = {path.stem: np.asarray(Image.open(path)) for path in out.iterdir()}
        assert np.array_equal(shown["expected"], np.asarray(picture()))
        assert np.array_equal(shown["actual"], np.asarray(actual))
        assert shown["difference"][0, 0].tolist() == [255, 255, 255]
        assert shown["difference"].sum() == 3 * 255
        assert pipevault.read_record(out / "actual.png").results["pixels"] == a_run(actual).record.results["pixels"]

    def test_of_several_pictures_those_that_differ_are_left(self, goldens: Path, out: Path) -> None:
        golden = written(goldens, a_run(picture(0), picture(1), picture(2)))
        error = failure(golden, a_run(picture(0), brighter(picture(1), 9), picture(2)), out)
        assert "1 of 3 samples differ" in str(error)
        assert sorted(path.name for path in out.iterdir()) == ["actual-1.png", "difference-1.png", "expected-1.png"]

    def test_pictures_of_an_earlier_failure_go_and_other_files_stay(self, goldens: Path, out: Path) -> None:
        golden = written(goldens)
        failure(golden, a_run(brighter(picture(), 4)), out)
        (out / "notes.txt").write_text("mine")
        check_drawn(golden, a_run(), Rules(), out=out)
        assert [path.name for path in out.iterdir()] == ["notes.txt"]

    def test_another_size(self, goldens: Path, out: Path) -> None:
        error = failure(written(goldens), a_run(picture(size=(8, 8))), out)
        assert "16x12 pixels of mode RGB were expected and 8x8 pixels of mode RGB came out" in str(error)
        assert sorted(path.name for path in out.iterdir()) == ["actual.png", "expected.png"]

    def test_another_mode(self, goldens: Path, out: Path) -> None:
        grey = picture().convert("L")
        assert "of mode L came out" in str(failure(written(goldens), a_run(grey), out))

    @pytest.mark.parametrize(("recorded", "drawn"), [(1, 2), (2, 1)])
    def test_more_or_fewer_samples(self, goldens: Path, out: Path, recorded: int, drawn: int) -> None:
        golden = written(goldens, a_run(*(picture(index) for index in range(recorded))))
        error = failure(golden, a_run(*(picture(index) for index in range(drawn))), out)
        assert f"{recorded} samples were expected, {drawn} came out" in str(error)
        assert [path.name for path in out.iterdir()] == ["actual-1.png" if drawn == 2 else "expected-1.png"]

    def test_arrays_are_shown_in_grey(self, goldens: Path, out: Path) -> None:
        array = np.linspace(-3, 3, 4 * 6 * 5, dtype=np.float32).reshape(4, 6, 5)
        golden = written(goldens, Drawn(a_run().record, (array,)))
        error = failure(golden, Drawn(a_run().record, (array + np.float32(0.5),)), out)
        assert "by 0.5 at most" in str(error)
        assert {path.stem: Image.open(path).size for path in out.iterdir()} == {
            "expected": (20, 6),
            "actual": (20, 6),
            "difference": (20, 6),
        }

    def test_arrays_must_have_the_same_type(self, goldens: Path, out: Path) -> None:
        array = np.zeros((2, 3, 3), np.float32)
        golden = written(goldens, Drawn(a_run().record, (array,)))
        assert "float64 arrays" in str(failure(golden, Drawn(a_run().record, (array.astype(np.float64),)), out))

    def test_what_comes_first_is_told(self, goldens: Path, out: Path) -> None:
        results = {**a_run().record.results, "latents": OTHER_KEY}
        error = failure(written(goldens), a_run(brighter(picture(), 1), results=results), out)
        assert "the noise is equal, the latents are other" in str(error)

    def test_another_seed_is_named(self, goldens: Path, out: Path) -> None:
        seeds = {"root": 8, "samples": [0], "source": "argument", "streams": {}}
        error = failure(written(goldens), a_run(brighter(picture(), 1), seeds=seeds), out)
        assert "The call is not the one that was recorded" in str(error)
        assert "call.seed: 7 in the golden, 8 here" in str(error)

    def test_graphs_that_were_frozen_again_are_named(self, goldens: Path, out: Path) -> None:
        golden = written(goldens, a_run(graphs={"unet": {KEY: MANIFEST}}))
        again = a_run(brighter(picture(), 1), graphs={"unet": {KEY: "e" * 64}})
        assert "other graphs ran, or they were frozen again" in str(failure(golden, again, out))
        same = a_run(brighter(picture(), 1), graphs={"unet": {KEY: MANIFEST}}, manifest="e" * 64)
        assert "frozen again" not in str(failure(golden, same, out)), "a plan computes nothing"

    def test_without_scikit_image_a_failure_is_a_failure(
        self, goldens: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "skimage", None)
        failure(written(goldens), a_run(brighter(picture(), 1)), out)
        assert (out / "difference.png").is_file()


class TestWeights:
    def test_changed_weights_are_named_by_their_parts(self, goldens: Path, out: Path) -> None:
        changed = a_run(brighter(picture(), 1), weights={"unet": "e" * 64, "vae.decoder": WEIGHTS})
        with pytest.raises(ChangedWeightsError, match="other weights of unet") as caught:
            check_drawn(written(goldens), changed, Rules(), out=out)
        assert caught.value.parts == ("unet",)

    def test_they_are_an_error_even_where_the_pixels_are_equal(self, goldens: Path, out: Path) -> None:
        with pytest.raises(ChangedWeightsError):
            check_drawn(written(goldens), a_run(weights={"unet": "e" * 64}), Rules(), out=out)

    def test_without_digests_it_cannot_be_told(self, goldens: Path, out: Path) -> None:
        golden = written(goldens, a_run(weights={}))
        assert "cannot be told" in str(failure(golden, a_run(brighter(picture(), 1)), out))
        assert check_drawn(golden, a_run(), Rules(), out=out).status == "equal"


class TestOtherKey:
    drawn = staticmethod(lambda by, **changes: a_run(brighter(picture(), by), key=OTHER_KEY, **changes))

    def test_equal_bytes_pass_and_say_what_differs(self, goldens: Path, out: Path) -> None:
        golden = written(goldens)
        passed = check_drawn(golden, a_run(key=OTHER_KEY, versions={"torch": "2.14.0"}), Rules(), out=out)
        assert passed.status == "equal"
        assert passed.differences == ("toolchain.torch: '2.13.0' in the golden, '2.14.0' here",)

    def test_others_fail_with_the_factors_and_what_to_do(self, goldens: Path, out: Path) -> None:
        golden = written(goldens, a_run(factors={"toolchain": {"torch": "2.13.0"}}), tolerance=TOLERANCE)
        error = failure(golden, self.drawn(1, factors={"toolchain": {"torch": "2.14.0"}}), out)
        assert "toolchain.torch: '2.13.0' in the golden, '2.14.0' here" in str(error)
        assert "record it again" in str(error)
        assert "--other-key" in str(error)

    def test_keys_whose_factors_are_unknown_are_named_themselves(self, goldens: Path, out: Path) -> None:
        assert "key: aaaaaaaaaaaa in the golden, bbbbbbbbbbbb here" in str(
            failure(written(goldens), self.drawn(1), out)
        )

    def test_within_the_tolerance_if_asked(self, goldens: Path, out: Path) -> None:
        golden = written(goldens, tolerance=TOLERANCE)
        passed = check_drawn(golden, self.drawn(3), Rules(other_key=True), out=out)
        assert passed.status == "within tolerance"
        assert passed.pixels is not None
        assert passed.pixels.max_abs == 3
        assert passed.latents is not None
        assert passed.latents.equal
        assert not out.exists()

    def test_asking_for_other_machines_does_not_ask_for_other_keys(self, goldens: Path, out: Path) -> None:
        failure(written(goldens, tolerance=TOLERANCE), self.drawn(1), out, Rules(other_machine=True))

    def test_beyond_the_tolerance(self, goldens: Path, out: Path) -> None:
        error = failure(written(goldens, tolerance=TOLERANCE), self.drawn(4), out, ALLOWED)
        assert "pixels max_abs is 4, the limit 3" in str(error)
        assert (out / "difference.png").is_file()

    def test_many_small_differences_are_beyond_the_mean(self, goldens: Path, out: Path) -> None:
        many = a_run(brighter(picture(), 2, pixels=16), key=OTHER_KEY)
        assert "pixels mean_abs" in str(failure(written(goldens, tolerance=TOLERANCE), many, out, ALLOWED))

    def test_latents_beyond_the_tolerance(self, goldens: Path, out: Path) -> None:
        error = failure(written(goldens, tolerance=TOLERANCE), self.drawn(1, latents=0.5), out, ALLOWED)
        assert "latents max_abs is 0.5, the limit 0.01" in str(error)

    def test_limits_of_what_was_not_seen_let_nothing_pass(self, goldens: Path, out: Path) -> None:
        golden = written(goldens)
        unseen = replace(self.drawn(100), latents=())
        error = failure(golden, unseen, out, Rules(Limits(latents_max_abs=1.0), other_key=True))
        assert "no limit is given for pixels" in str(error)

    def test_limits_of_the_suite_take_the_place_of_measured_ones(self, goldens: Path, out: Path) -> None:
        golden = written(goldens, tolerance=TOLERANCE)
        assert check_drawn(golden, self.drawn(4), Rules(Limits(pixels_max_abs=4), other_key=True), out=out).pixels
        failure(golden, self.drawn(3), out, Rules(Limits(pixels_max_abs=2), other_key=True))

    def test_another_size_is_beyond_every_tolerance(self, goldens: Path, out: Path) -> None:
        golden = written(goldens, tolerance=TOLERANCE)
        error = failure(golden, a_run(picture(size=(8, 8)), key=OTHER_KEY), out, ALLOWED)
        assert "8x8 pixels" in str(error)

    def test_without_a_tolerance_there_is_nothing_to_compare_within(self, goldens: Path, out: Path) -> None:
        error = failure(written(goldens), self.drawn(1), out, ALLOWED)
        assert "has none yet; see --measure-tolerance" in str(error)


class TestOtherMachine:
    def test_the_golden_of_this_machine_type_is_taken(self, goldens: Path) -> None:
        one, two = a_golden(goldens), a_golden(goldens, a_run(machine=TWO_THREADS))
        write_golden(one)
        write_golden(two)
        assert find_golden(goldens, "seven", TWO_THREADS, Rules()).path == two.path
        assert find_golden(goldens, "seven", MACHINE, Rules()).path == one.path

    def test_no_golden_at_all(self, goldens: Path) -> None:
        with pytest.raises(NoGoldenError, match=r"Nothing was recorded for 'seven'.*golden record"):
            find_golden(goldens, "seven", MACHINE, ALLOWED)

    def test_only_one_of_another_type_is_refused_with_the_difference(self, goldens: Path) -> None:
        written(goldens, tolerance=TOLERANCE)
        with pytest.raises(OtherMachineError, match=r"machine\.threads: 1 in the golden, 2 here") as caught:
            find_golden(goldens, "seven", TWO_THREADS, Rules())
        assert caught.value.differences == ("machine.threads: 1 in the golden, 2 here",)
        assert machine_type(TWO_THREADS) in str(caught.value)
        assert "--other-machine" in str(caught.value)

    def test_without_a_tolerance_it_is_refused_even_if_allowed(self, goldens: Path) -> None:
        written(goldens)
        with pytest.raises(OtherMachineError, match="no tolerance"):
            find_golden(goldens, "seven", TWO_THREADS, ALLOWED)

    def test_the_nearest_type_is_taken_if_allowed(self, goldens: Path) -> None:
        far = {**MACHINE, "capability": "AVX2", "features": ["avx2"], "threads": 8}
        for machine in (far, MACHINE):
            write_golden(a_golden(goldens, a_run(machine=machine), tolerance=TOLERANCE))
        found = find_golden(goldens, "seven", TWO_THREADS, ALLOWED)
        assert found.machine_type == machine_type(MACHINE)

    @pytest.mark.parametrize(("by", "status"), [(0, "equal"), (3, "within tolerance")])
    def test_it_passes_within_the_tolerance(self, goldens: Path, out: Path, by: int, status: str) -> None:
        golden = written(goldens, tolerance=TOLERANCE)
        drawn = a_run(brighter(picture(), by), machine=TWO_THREADS, key=OTHER_KEY)
        assert check_drawn(golden, drawn, ALLOWED, out=out).status == status

    def test_a_tolerance_counts_only_if_that_is_allowed(self, goldens: Path, out: Path) -> None:
        golden = written(goldens, tolerance=TOLERANCE)
        failure(golden, a_run(brighter(picture(), 1), machine=TWO_THREADS, key=OTHER_KEY), out, Rules(other_key=True))

    def test_beyond_the_tolerance_it_fails_with_pictures(self, goldens: Path, out: Path) -> None:
        golden = written(goldens, tolerance=TOLERANCE)
        failure(golden, a_run(brighter(picture(), 9), machine=TWO_THREADS, key=OTHER_KEY), out, ALLOWED)
        assert (out / "expected.png").is_file()


class TestMachineType:
    def test_threads_and_processor_count(self) -> None:
        names = {
            machine_type(machine)
            for machine in (MACHINE, TWO_THREADS, {**MACHINE, "features": []}, {**MACHINE, "capability": "AVX2"})
        }
        assert len(names) == 4
        assert machine_type(MACHINE).startswith("cpu-avx512-1t-")

    def test_a_library_does_not(self) -> None:
        assert machine_type({**MACHINE, "onednn": "4.0"}) == machine_type(MACHINE)

    def test_a_gpu_has_its_name(self) -> None:
        name = machine_type({"type": "cuda", "name": "NVIDIA H200 / 141GB", "sm_count": 132, "cuda": "13.0"})
        assert name.startswith("cuda-nvidia-h200-141gb-")
        assert name == machine_type({"type": "cuda", "name": "NVIDIA H200 / 141GB", "sm_count": 132, "cuda": "12.8"})

    def test_a_record_without_a_machine_has_a_type_too(self) -> None:
        assert machine_type({}).startswith("unknown-")
