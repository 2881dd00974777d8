"""The pytest plugin, in runs of pytest of their own."""

from __future__ import annotations

import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest

# Runs in this process forget what they import, and NumPy and torch cannot be imported twice.
import skimage.metrics  # noqa: F401

import pipevault.evidence.golden.run  # noqa: F401

pytest_plugins = ["pytester"]

PAINT = """
    import sys
    sys.path.insert(0, {tests!r})
    from helpers.golden_runs import a_run, brighter, picture, MACHINE, OTHER_KEY

    class Output(dict):
        def __init__(self, run):
            super().__init__(images=list(run.samples))
            self._pipevault_record = run.record
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project whose tests can make outputs with records."""
    tests = str(Path(__file__).parent)
    pytester.makeconftest("")
    pytester.makepyfile(painting=textwrap.dedent(PAINT.format(tests=tests)))
    return pytester


def write_test(project: pytest.Pytester, body: str, name: str = "test_digits") -> None:
    text = textwrap.dedent(body)
    project.makepyfile(**{name: f"import pytest\nfrom painting import *\n\n{text}"})


SEVEN = """
    def test_seven(pipevault_golden):
        pipevault_golden(Output(a_run(picture(7))), "seven")
"""
CHANGED = SEVEN.replace("picture(7)", "brighter(picture(7), 3)")


def outcomes(project: pytest.Pytester, *options: str, **expected: int) -> pytest.RunResult:
    result = project.runpytest_inprocess(*options)
    result.assert_outcomes(**expected)
    return result


def test_it_is_an_entry_point_of_pytest() -> None:
    [plugin] = [found for found in entry_points(group="pytest11") if found.name == "pipevault"]
    assert plugin.value == "pipevault.pytest_plugin"


def test_the_fixture_is_listed_with_what_it_does(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess("--fixtures")
    result.stdout.fnmatch_lines(["pipevault_golden*", "*golden next to the test file*"])


def test_a_run_that_does_not_use_it_imports_nothing_heavy(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_imports():
            heavy = {"torch", "numpy", "PIL", "diffusers", "transformers", "onediff", "click"}
            heavy.add("pipevault.cache.pipeline_cache")
            assert "pipevault.pytest_plugin" in sys.modules
            assert heavy & set(sys.modules) == set()
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_a_project_without_torch_runs(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "import sys\nfor name in ('torch', 'numpy', 'PIL', 'diffusers'):\n    sys.modules[name] = None\n"
    )
    pytester.makepyfile("def test_nothing():\n    pass\n")
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_without_a_golden_it_fails_and_says_how_to_record(project: pytest.Pytester) -> None:
    write_test(project, SEVEN)
    result = outcomes(project, failed=1)
    result.stdout.fnmatch_lines(["*NoGoldenError*Record it with `pytest --pipevault-golden-record`*"])


def test_recorded_then_equal_then_different(project: pytest.Pytester) -> None:
    write_test(project, SEVEN)
    outcomes(project, "--pipevault-golden-record", passed=1)
    [golden] = project.path.glob("goldens/test_digits/cpu-avx512-1t-*/test_seven-seven")
    assert sorted(path.name for path in golden.iterdir()) == ["0.png", "golden.json"]
    outcomes(project, passed=1)
    write_test(project, CHANGED)
    result = outcomes(project, "--basetemp", str(project.path / "temporary"), failed=1)
    result.stdout.fnmatch_lines(["*DifferentOutputError*1 of 1 samples differ*pipevault-golden*"])
    result.stdout.no_fnmatch_line("*golden_check.py*")
    [difference] = project.path.glob("temporary/test_seven0/pipevault-golden/test_seven-seven/difference.png")
    assert difference.with_name("expected.png").is_file()
    assert difference.with_name("actual.png").is_file()


def test_recording_leaves_what_is_there_and_overwriting_does_not(project: pytest.Pytester) -> None:
    write_test(project, SEVEN)
    outcomes(project, "--pipevault-golden-record", passed=1)
    write_test(project, CHANGED)
    outcomes(project, "--pipevault-golden-record", failed=1)
    outcomes(project, "--pipevault-golden-overwrite", passed=1)
    outcomes(project, passed=1)


def test_out_says_where_the_pictures_go(project: pytest.Pytester) -> None:
    write_test(project, SEVEN)
    outcomes(project, "--pipevault-golden-record", passed=1)
    write_test(project, CHANGED)
    outcomes(project, "--pipevault-golden-out", "failures", failed=1)
    assert (project.path / "failures" / "test_digits" / "test_seven-seven" / "difference.png").is_file()


def test_pictures_alone_need_the_record(project: pytest.Pytester) -> None:
    write_test(
        project,
        """
        def test_with(pipevault_golden):
            run = a_run(picture(7))
            pipevault_golden([picture(7)], record=run.record)

        def test_without(pipevault_golden):
            pipevault_golden([picture(7)])
        """,
    )
    result = outcomes(project, "--pipevault-golden-record", passed=1, failed=1)
    result.stdout.fnmatch_lines(["*SettingsError*has no run record*"])


def test_each_test_and_parameter_has_goldens_of_its_own(project: pytest.Pytester) -> None:
    write_test(
        project,
        """
        @pytest.mark.parametrize("seed", [1, 2])
        @pytest.mark.parametrize("prompt", ["a/b", "a b"])
        def test_digit(pipevault_golden, seed, prompt):
            pipevault_golden(Output(a_run(picture(seed + len(prompt)))), "one")
            pipevault_golden(Output(a_run(picture(9))), "two")

        class TestMore:
            def test_digit(self, pipevault_golden):
                pipevault_golden(Output(a_run(picture(5))), "one")
        """,
    )
    outcomes(project, "--pipevault-golden-record", passed=5)
    assert len(list(project.path.glob("goldens/test_digits/*/*"))) == 9
    outcomes(project, passed=5)


def test_one_name_serves_one_output(project: pytest.Pytester) -> None:
    write_test(
        project,
        """
        def test_twice(pipevault_golden):
            pipevault_golden(Output(a_run(picture(1))), "one")
            pipevault_golden(Output(a_run(picture(2))), "one")
        """,
    )
    result = outcomes(project, "--pipevault-golden-record", failed=1)
    result.stdout.fnmatch_lines(["*SettingsError*a name of its own*"])


def test_another_machine_type(project: pytest.Pytester) -> None:
    write_test(project, SEVEN)
    outcomes(project, "--pipevault-golden-record", passed=1)
    write_test(
        project,
        """
        def test_seven(pipevault_golden):
            run = a_run(brighter(picture(7), 3), machine={**MACHINE, "threads": 2}, key=OTHER_KEY)
            pipevault_golden(Output(run), "seven", tolerance={"pixels_max_abs": 3})
        """,
    )
    result = outcomes(project, failed=1)
    result.stdout.fnmatch_lines(["*OtherMachineError*machine.threads: 1 in the golden, 2 here*"])
    outcomes(project, "--pipevault-golden-other-machine", passed=1)


def test_a_tolerance_that_is_none(project: pytest.Pytester) -> None:
    write_test(project, SEVEN.replace('"seven")', '"seven", tolerance={"pixels": 3})'))
    outcomes(project, failed=1).stdout.fnmatch_lines(["*SettingsError*tolerance*unknown field `pixels`*"])
