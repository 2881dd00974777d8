"""The scripts: what setup.sh installs and refuses, what prewarm.py says, what measure_hit.py prints."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"

VENV_PYTHON = """#!/bin/bash
case "$*" in
    "-c "*) exit 0 ;;
    "-m pip --version") exit 0 ;;
    "-m pip"*) printf '%s\\n' "$*" >>"{log}"; exit "${{PIP_EXIT_CODE:-0}}" ;;
    *) exec "{python}" "$@" ;;
esac
"""


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(stat.S_IRWXU)


class Checkout:
    """A copy of what setup.sh needs, with a search path of its own and a ``.venv`` that only notes pip's calls."""

    def __init__(self, root: Path) -> None:
        self.root = root / "check out"  # a space in the path
        self.programs = root / "bin"
        self.log = root / "pip.txt"
        (self.root / "scripts").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh", "scripts/demo.sh"):
            shutil.copy(ROOT / name, self.root / name)
        self.programs.mkdir()
        for name in ("bash", "dirname", "rm", "env"):
            (self.programs / name).symlink_to(shutil.which(name) or name)
        executable(self.programs / "g++", "#!/bin/bash\n")

    def make_venv(self) -> None:
        executable(self.root / ".venv/bin/python", VENV_PYTHON.format(log=self.log, python=sys.executable))
        executable(self.root / ".venv/bin/pipevault", '#!/bin/bash\nprintf "%s|" "$@"\n')

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHON")}
        return subprocess.run(
            ["bash", str(self.root / "scripts" / script), *arguments],
            env={**clean, "PATH": str(self.programs), **environment},
            cwd=self.root.parent,
            capture_output=True,
            text=True,
        )

    def installs(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


class TestSetup:
    def test_torch_comes_first_and_alone(self, checkout: Checkout) -> None:
        checkout.make_venv()
        result = checkout.run("setup.sh")
        assert result.returncode == 0, result.stderr
        torch, package = checkout.installs()
        assert torch.endswith(f"--constraint {checkout.root}/constraints.txt torch")
        assert package.endswith(f"--constraint {checkout.root}/constraints.txt --editable {checkout.root}[dev]")

    def test_nothing_is_said_on_stdout(self, checkout: Checkout) -> None:
        checkout.make_venv()
        assert checkout.run("setup.sh").stdout == ""

    def test_a_second_run_installs_nothing(self, checkout: Checkout) -> None:
        checkout.make_venv()
        checkout.run("setup.sh")
        assert checkout.run("setup.sh").returncode == 0
        assert len(checkout.installs()) == 2

    @pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
    def test_a_change_installs_again(self, checkout: Checkout, name: str) -> None:
        checkout.make_venv()
        checkout.run("setup.sh")
        (checkout.root / name).write_text((checkout.root / name).read_text() + "\n# changed\n")
        checkout.run("setup.sh")
        assert len(checkout.installs()) == 4

    def test_a_checkout_that_was_moved_installs_again(self, checkout: Checkout) -> None:
        checkout.make_venv()
        checkout.run("setup.sh")
        checkout.root = checkout.root.rename(checkout.root.with_name("elsewhere"))
        checkout.run("setup.sh")
        assert len(checkout.installs()) == 4

    def test_a_failed_installation_is_an_error_and_is_tried_again(self, checkout: Checkout) -> None:
        checkout.make_venv()
        result = checkout.run("setup.sh", PIP_EXIT_CODE="1")
        assert result.returncode == 1
        assert "error: torch could not be installed" in result.stderr
        assert checkout.run("setup.sh").returncode == 0
        assert len(checkout.installs()) == 3

    def test_a_failed_change_that_is_taken_back_installs_again(self, checkout: Checkout) -> None:
        checkout.make_venv()
        checkout.run("setup.sh")
        constraints = checkout.root / "constraints.txt"
        before = constraints.read_text()
        constraints.write_text(f"{before}\n# changed\n")
        assert checkout.run("setup.sh", PIP_EXIT_CODE="1").returncode == 1
        constraints.write_text(before)
        checkout.run("setup.sh")
        assert len(checkout.installs()) == 5

    def test_no_compiler(self, checkout: Checkout) -> None:
        (checkout.programs / "g++").unlink()
        result = checkout.run("setup.sh")
        assert result.returncode == 1
        assert "error: no C++ compiler: g++ was not found" in result.stderr

    def test_a_compiler_named_in_cxx_that_is_missing(self, checkout: Checkout) -> None:
        result = checkout.run("setup.sh", CXX="no-such-compiler")
        assert result.returncode == 1
        assert "no-such-compiler was not found" in result.stderr

    def test_python_is_too_old(self, checkout: Checkout) -> None:
        executable(
            checkout.programs / "python3",
            '#!/bin/bash\n[[ $1 == --version ]] && { echo "Python 3.8.18"; exit 0; }\nexit 1\n',
        )
        result = checkout.run("setup.sh")
        assert result.returncode == 1
        assert "error: Python 3.10 or newer is needed; python3 is Python 3.8.18." in result.stderr
        assert not (checkout.root / ".venv").exists()

    def test_no_python(self, checkout: Checkout) -> None:
        result = checkout.run("setup.sh")
        assert result.returncode == 1
        assert "Python 3.10 or newer is needed" in result.stderr

    def test_a_named_python_that_is_none(self, checkout: Checkout) -> None:
        result = checkout.run("setup.sh", PYTHON="/no/such/python")
        assert result.returncode == 1
        assert "PYTHON=/no/such/python" in result.stderr

    def test_a_newer_python_beside_an_old_one_is_taken(self, checkout: Checkout) -> None:
        executable(checkout.programs / "python3", "#!/bin/bash\nexit 1\n")
        executable(
            checkout.programs / "python3.11",
            f'#!/bin/bash\n[[ $1 == -m ]] && {{ echo "made $4"; exit 3; }}\nexec "{sys.executable}" "$@"\n',
        )
        result = checkout.run("setup.sh")
        assert f"made {checkout.root}/.venv" in result.stderr
        assert "error: python3.11 could not make a virtual environment" in result.stderr


def test_demo_sh_passes_its_options_on(checkout: Checkout) -> None:
    checkout.make_venv()
    result = checkout.run("demo.sh", "--out", "a b.png", "--json")
    assert (result.returncode, result.stdout) == (0, "demo|--out|a b.png|--json|")


CHECKED_PYTHON = """#!/bin/bash
case "$*" in
    "-m venv --clear "*)
        mkdir -p "$4/bin"
        cp "$0" "$4/bin/python"
        cp "{programs}/stub-pipevault" "$4/bin/pipevault" ;;
    "-m pip"*) printf '%s\\n' "$*" >>"{log}"; [[ $* != *"${{BROKEN_INSTALL:-nothing}}"* ]] ;;
    "-m pytest"*) printf '%s\\n' "$*" >>"{log}"; exit "${{PYTEST_EXIT_CODE:-0}}" ;;
    "-c import sys, torch"*) [[ ${{OTHER_TORCH:-}} == "" ]] ;;
    *) exec "{python}" "$@" ;;
esac
"""
STUB_PIPEVAULT = """#!/bin/bash
vault=$3
outcome=miss
[[ -d $vault ]] && outcome=hit
mkdir -p "$vault"
pixels="${STUB_PIXELS:-same}"
[[ $pixels == change ]] && pixels=$outcome
printf '{"outcome": "%s", "pixels_sha256": "%s", "ready_s": 1.5}\\n' "${STUB_OUTCOME:-$outcome}" "$pixels"
exit "${DEMO_EXIT_CODE:-0}"
"""


Run = Callable[..., subprocess.CompletedProcess[str]]


class TestCheckVersions:
    """With a stub for Python: nothing is downloaded."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Run:
        programs = tmp_path / "bin"
        text = CHECKED_PYTHON.format(programs=programs, log=tmp_path / "pip.txt", python=sys.executable)
        executable(programs / "stub-python", text)
        executable(programs / "stub-pipevault", STUB_PIPEVAULT)

        def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["bash", str(SCRIPTS / "check_versions.sh"), *arguments],
                env={**os.environ, "PYTHON": str(programs / "stub-python"), "TMPDIR": str(tmp_path), **environment},
                capture_output=True,
                text=True,
            )

        return run

    def test_help(self, run: Run) -> None:
        result = run("--help")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("usage: scripts/check_versions.sh ")

    @pytest.mark.parametrize("arguments", [(), ("--unknown",), ("two",), ("--dir",), ("2.11.0", "$(id)")])
    def test_wrong_usage(self, run: Run, arguments: tuple[str, ...]) -> None:
        result = run(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert "usage: scripts/check_versions.sh " in result.stderr

    def test_one_line_for_each_version(self, run: Run, tmp_path: Path) -> None:
        result = run("2.9.1", "2.15.0")
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines() == [
            "2.9.1 ok, miss ready_s 1.5, hit ready_s 1.5",
            "2.15.0 ok, miss ready_s 1.5, hit ready_s 1.5",
        ]
        torch, package, tests = (tmp_path / "pip.txt").read_text().splitlines()[:3]
        assert torch.endswith("torch==2.9.1")
        assert package.endswith(f"--editable {ROOT}[dev] torch==2.9.1")
        assert tests.endswith("tests/graphs tests/cache")
        assert list(tmp_path.glob("pipevault-versions.*")) == []

    def test_the_pin_of_torch_is_left_out(self, run: Run, tmp_path: Path) -> None:
        assert run("--dir", str(tmp_path / "a folder"), "--demo-only", "2.11.0").returncode == 0
        kept = (tmp_path / "a folder" / "constraints.txt").read_text().splitlines()
        assert not any(line.startswith("torch==") for line in kept)
        assert set(kept) < set((ROOT / "constraints.txt").read_text().splitlines())
        assert "-m pytest" not in (tmp_path / "pip.txt").read_text()

    @pytest.mark.parametrize(
        ("environment", "reason"),
        [
            ({"BROKEN_INSTALL": "torch==2.11.0"}, "torch could not be installed"),
            ({"BROKEN_INSTALL": "--editable"}, "the package could not be installed beside this torch"),
            ({"OTHER_TORCH": "1"}, "another torch is installed, or it cannot be imported"),
            ({"DEMO_EXIT_CODE": "1"}, "the demo could not be frozen"),
            ({"STUB_OUTCOME": "miss"}, "miss then miss, not miss then hit"),
            ({"STUB_PIXELS": "change"}, "the hit drew other pixels than the miss"),
            ({"PYTEST_EXIT_CODE": "1"}, "tests; miss ready_s 1.5, hit ready_s 1.5"),
        ],
    )
    def test_what_failed(self, run: Run, tmp_path: Path, environment: dict[str, str], reason: str) -> None:
        result = run("2.11.0", **environment)
        assert (result.returncode, result.stdout) == (1, f"2.11.0 failed: {reason}\n")
        assert "Environments and logs are in" in result.stderr

    def test_versions_after_one_that_failed_are_tried(self, run: Run) -> None:
        result = run("2.11.0", "2.15.0", BROKEN_INSTALL="torch==2.11.0")
        assert [line.split()[:2] for line in result.stdout.splitlines()] == [["2.11.0", "failed:"], ["2.15.0", "ok,"]]
        assert result.returncode == 1

    def test_shellcheck_has_nothing_to_say(self) -> None:
        shellcheck = shutil.which("shellcheck")
        if shellcheck is None:
            pytest.skip("needs shellcheck")
        result = subprocess.run([shellcheck, str(SCRIPTS / "check_versions.sh")], capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (0, "")


class TestPrewarm:
    """The script hands over to the command, see test_cli_prewarm.py."""

    def test_it_is_the_command(self) -> None:
        result = subprocess.run(
            [sys.executable, str(SCRIPTS / "prewarm.py"), "demo", "--size", "512"], capture_output=True, text=True
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == (
            "pipevault: bad-setting: Invalid size '512': expected WIDTHxHEIGHT, for example 768x512.\n"
        )

    def test_a_python_without_the_package_is_told_which_one_to_take(self) -> None:
        command = [sys.executable, "-I", "-S", str(SCRIPTS / "prewarm.py"), "demo"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 1
        assert result.stderr.startswith(f"pipevault cannot be imported by {sys.executable} (No module named ")
        assert str(ROOT / ".venv" / "bin" / "python") in result.stderr
        assert "pip install " in result.stderr
        assert "Traceback" not in result.stderr


class TestMeasureHit:
    def test_table(self) -> None:
        script = load_script("measure_hit")
        measures = [
            script.Measure("a hit adds", 23.4, 100, "ms"),
            script.Measure("processes", 1, 0, ""),
            script.Measure("imports", 9, None, "ms"),
        ]
        lines = script.markdown(measures, {"cpu": "X", "cores": 2}, model="demo", runs=3).splitlines()
        assert lines[2:] == [
            "| a hit adds | 23 ms | 100 ms |",
            "| processes | 1 **over** | 0 |",
            "| imports | 9 ms |  |",
            "",
            "Machine: cpu X, cores 2.",
        ]

    def test_the_machine_is_described_without_its_name(self) -> None:
        facts = load_script("measure_hit").machine()
        assert os.uname().nodename not in " ".join(map(str, facts.values())).split()

    def test_measured_processes_use_bytecode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        variables = load_script("measure_hit").environment()
        assert ("PYTHONDONTWRITEBYTECODE" in variables, variables["OMP_NUM_THREADS"]) == (False, "3")

    def test_the_first_run_does_not_count(self) -> None:
        numbers = iter(range(10))
        assert load_script("measure_hit").warmed_up(lambda: next(numbers), 3) == [1, 2, 3]

    def test_importing_pipevault_takes_no_torch(self) -> None:
        answer = load_script("measure_hit").import_in_fresh_process()
        assert answer["torch_imported"] is False

    def test_a_child_that_fails_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(subprocess.CalledProcessError):
            load_script("measure_hit").in_fresh_process("no such child", "demo", tmp_path)
