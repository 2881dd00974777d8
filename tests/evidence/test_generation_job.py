"""The process of one generation: what it is given, and every way in which it can fail. Stand-ins play the child."""

from __future__ import annotations

import json
import pickle
import stat
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipevault.errors import CannotFreezeError, PipevaultError, SettingsError, TrainingModeError
from pipevault.evidence.fresh_generation import main
from pipevault.evidence.generation_job import GenerationJob, generate_in_fresh_process
from pipevault.evidence.request import Request

JOB = GenerationJob("./model", Request(("a cat",), seed=3), "eager")
RESULT: dict[str, Any] = {
    "pictures": ["picture-0.npy", "picture-1.npy"],
    "pixels": ["a", "b"],
    "warm_pixels": ["a", "b"],
    "latents": "latents.npy",
    "noise": "n",
    "seconds": {"first": 1.5},
    "outcome": "hit",
    "key": None,
    "device": "cpu",
    "threads": 1,
    "capability": "AVX2",
    "versions": {"torch": "2.13.0"},
}
WRITE_RESULT = f"(folder / 'result.json').write_text({json.dumps(RESULT)!r})"


class Child:
    """Lets ``sys.executable`` be a script, so that it is started in place of Python."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._script = folder / "python"
        self._python = sys.executable
        self._monkeypatch = monkeypatch

    def runs(self, body: str) -> None:
        """``body`` is Python; ``folder`` is the job's folder."""
        head = "import os, pathlib, signal, sys\nfolder = pathlib.Path(sys.argv[-1]).parent\n"
        self._write(f"#!{self._python} -S\n{head}{body}\n")

    def runs_shell(self, body: str) -> None:
        self._write(f'#!/bin/sh\nfor job; do :; done\nfolder=$(dirname "$job")\n{body}\n')

    def _write(self, text: str) -> None:
        self._script.write_text(text)
        self._script.chmod(stat.S_IRWXU)
        self._monkeypatch.setattr(sys, "executable", str(self._script))


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    return Child(tmp_path, monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a run"  # a space in the path


def failure(job: GenerationJob, folder: Path, **options: Any) -> str:
    with pytest.raises(PipevaultError) as caught:
        generate_in_fresh_process(job, folder, label="eager again", **options)
    assert type(caught.value) is PipevaultError
    assert "eager again" in str(caught.value)
    return str(caught.value)


def test_a_result_comes_back_with_the_files_of_its_folder(child: Child, folder: Path) -> None:
    child.runs(WRITE_RESULT)
    result = generate_in_fresh_process(JOB, folder)
    assert result.pictures == (folder / "picture-0.npy", folder / "picture-1.npy")
    assert result.latents == folder / "latents.npy"
    assert (result.pixels, result.outcome, result.seconds["first"]) == (("a", "b"), "hit", 1.5)


def test_the_child_is_given_the_job(child: Child, folder: Path) -> None:
    child.runs(WRITE_RESULT)
    job = GenerationJob(
        *("./model", Request(("a cat", "a dog"), seed=2**63, steps=4, guidance_scale=2.5, height=64), "frozen"),
        dtype="bfloat16",
        dir=Path("/a/vault"),
        build_config={"max_autotune": True},
        environment={"A": "b"},
    )
    generate_in_fresh_process(job, folder)
    document = json.loads((folder / "job.json").read_text())
    assert GenerationJob.from_json(document["job"]) == job
    assert document["started_at_s"] > 0


def environment_of(job: GenerationJob, child: Child, folder: Path) -> dict[str, str]:
    child.runs(f"{WRITE_RESULT}\nimport json\nprint(json.dumps(dict(os.environ)))\nprint(os.listdir(folder))")
    generate_in_fresh_process(job, folder)
    variables, files = (folder / "output.txt").read_text().splitlines()
    assert "compile-cache" not in files
    found: dict[str, str] = json.loads(variables)
    return found


def test_the_environment_is_the_parents_with_the_jobs_over_it(
    child: Child, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONE", "parent")
    monkeypatch.setenv("TWO", "parent")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/of/the/user")
    job = GenerationJob("./model", Request(), "eager", environment={"TWO": "job"})
    environment = environment_of(job, child, folder)
    assert (environment["ONE"], environment["TWO"]) == ("parent", "job")
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "/of/the/user"


def test_torch_compile_finds_an_empty_compile_cache(
    child: Child, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/of/the/user")
    environment = environment_of(GenerationJob("./model", Request(), "torch.compile"), child, folder)
    assert Path(environment["TORCHINDUCTOR_CACHE_DIR"]).parent == folder
    assert Path(environment["TRITON_CACHE_DIR"]).is_relative_to(folder)


def test_the_compile_cache_is_gone_afterwards(child: Child, folder: Path) -> None:
    child.runs(f"os.makedirs(os.environ['TORCHINDUCTOR_CACHE_DIR'] + '/x')\n{WRITE_RESULT}")
    generate_in_fresh_process(GenerationJob("./model", Request(), "torch.compile"), folder)
    assert not (folder / "compile-cache").exists()


@pytest.mark.parametrize("argument", [object(), b"bytes", {1, 2}])
def test_arguments_that_are_no_json(folder: Path, argument: Any) -> None:
    job = GenerationJob("./model", Request(arguments={"image": argument}), "eager")
    with pytest.raises(SettingsError, match="plain JSON"):
        generate_in_fresh_process(job, folder)


def test_a_child_that_fails_shows_the_last_lines_that_it_printed(child: Child, folder: Path) -> None:
    child.runs("for n in range(100): print('line', n, flush=True)\nraise RuntimeError('out of luck')")
    text = failure(JOB, folder)
    assert "exit code 1" in text
    assert text.endswith("RuntimeError: out of luck")
    assert "line 99" in text
    assert "line 9\n" not in text


def test_a_child_that_fails_in_silence(child: Child, folder: Path) -> None:
    child.runs("sys.exit(3)")
    text = failure(JOB, folder)
    assert "exit code 3" in text
    assert "It printed nothing." in text


def test_what_is_printed_need_not_be_text(child: Child, folder: Path) -> None:
    child.runs(r"os.write(1, b'\xff\xfe broken'); sys.exit(1)")
    assert "broken" in failure(JOB, folder)


@pytest.mark.parametrize(
    "document",
    [
        "no JSON",
        "[]",
        "null",
        json.dumps({name: value for name, value in RESULT.items() if name != "pixels"}),
        json.dumps({**RESULT, "pictures": 7}),
    ],
)
def test_a_child_that_writes_garbage(child: Child, folder: Path, document: str) -> None:
    child.runs(f"(folder / 'result.json').write_text({document!r}); print('all is well')")
    text = failure(JOB, folder)
    assert "without a result that can be read" in text
    assert "all is well" in text


def test_a_child_that_writes_nothing(child: Child, folder: Path) -> None:
    child.runs("pass")
    assert "without a result that can be read (FileNotFoundError" in failure(JOB, folder)


def test_a_child_that_is_killed(child: Child, folder: Path) -> None:
    child.runs(f"{WRITE_RESULT}\nprint('so far', flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    text = failure(JOB, folder)
    assert "was killed by SIGKILL" in text
    assert "so far" in text


def test_a_child_that_takes_too_long_is_ended_with_all_that_it_started(child: Child, folder: Path) -> None:
    child.runs_shell('sleep 1000 &\necho $! >"$folder/compiler.txt"\necho compiling\nwait')
    text = failure(JOB, folder, timeout_s=2)
    assert "longer than 2 s" in text
    assert "compiling" in text
    compiler = int((folder / "compiler.txt").read_text())
    if psutil.pid_exists(compiler):
        process = psutil.Process(compiler)
        assert process.status() == psutil.STATUS_ZOMBIE or process.wait(timeout=30) is None


def test_an_error_of_pipevault_comes_back_as_it_is(child: Child, folder: Path) -> None:
    error = TrainingModeError("unet is in training mode", "unet")
    child.runs(f"(folder / 'error.pickle').write_bytes({pickle.dumps(error)!r}); sys.exit(1)")
    with pytest.raises(CannotFreezeError, match=r"^frozen failed: unet is in training mode$") as caught:
        generate_in_fresh_process(JOB, folder, label="frozen")
    assert type(caught.value) is TrainingModeError
    assert caught.value.part == "unet"


def test_the_child_writes_an_error_of_pipevault_and_leaves_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate_for(job: GenerationJob, folder: Path, *, started_at_s: float) -> Any:
        assert (job, folder, started_at_s) == (JOB, tmp_path, 12.5)
        raise TrainingModeError("in training mode", "unet")

    monkeypatch.setattr("pipevault.evidence.fresh_generation.generate_for", generate_for)
    (tmp_path / "job.json").write_text(json.dumps({"job": asdict(JOB), "started_at_s": 12.5}))
    assert main(tmp_path / "job.json") == 1
    error = pickle.loads((tmp_path / "error.pickle").read_bytes())
    assert (type(error), error.part, str(error)) == (TrainingModeError, "unet", "in training mode")
    assert not (tmp_path / "result.json").exists()


def test_a_real_process_with_a_model_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started in a folder with a ``torch.py``, which it must not import; Python 3.10 cannot be kept from that."""
    if sys.version_info >= (3, 11):
        (tmp_path / "torch.py").write_text("raise SystemExit('the wrong torch')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"^eager failed: The folder \./none does not exist"):
        generate_in_fresh_process(GenerationJob("./none", Request(), "eager"), tmp_path / "run", label="eager")
