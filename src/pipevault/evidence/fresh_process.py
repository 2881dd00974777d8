"""One generation in a Python process of its own, so that nothing in memory is shared with any other.

The parent writes ``job.json`` into an empty folder and starts :mod:`pipevault.evidence.fresh_generation`; the child
writes the pictures and ``result.json`` next to it, or ``error.pickle`` for an error of pipevault's own.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from pipevault.errors import PipevaultError, SettingsError
from pipevault.evidence.generation_job import (
    COMPILED,
    COMPILED_BY_BLOCKS,
    ERROR_FILE,
    JOB_FILE,
    OUTPUT_FILE,
    RESULT_FILE,
    GenerationJob,
    GenerationResult,
)

_CACHE_FOLDER = "compile-cache"
_SHOWN_LINES = 12


def generate_in_fresh_process(
    job: GenerationJob, folder: Path, *, label: str = "", timeout_s: float | None = None
) -> GenerationResult:
    """What the job gave; its files are in ``folder``, which is made and must be empty. ``label`` names it in errors.

    Raises the child's own error where that is a :class:`PipevaultError`, and a :class:`PipevaultError` with the last
    lines that it printed for a child that failed otherwise, was killed, left no result or took over ``timeout_s``.
    """
    name = label or f"{job.method} generation of {job.model}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        text = json.dumps({"job": job.to_json(), "started_at_s": time.time()})
    except TypeError as error:
        raise SettingsError(f"The arguments of {name} must be plain JSON to go to another process: {error}.") from error
    (folder / JOB_FILE).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pipevault.evidence.fresh_generation", str(folder / JOB_FILE)]
    try:
        return_code = _wait_for(command, _environment(job, folder), folder / OUTPUT_FILE, name, timeout_s)
    finally:
        shutil.rmtree(folder / _CACHE_FOLDER, ignore_errors=True)
    if (folder / ERROR_FILE).is_file():
        raise _error_of_child(folder / ERROR_FILE, name)
    if return_code:
        raise PipevaultError(f"{name} failed: its process {_ending(return_code)}. {_last_lines(folder / OUTPUT_FILE)}")
    try:
        return GenerationResult.from_json(json.loads((folder / RESULT_FILE).read_text("utf-8")), folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise PipevaultError(
            f"{name} failed: its process ended without a result that can be read ({type(error).__name__}: {error}). "
            f"{_last_lines(folder / OUTPUT_FILE)}"
        ) from error


def _environment(job: GenerationJob, folder: Path) -> dict[str, str]:
    # Python 3.11 and later keep the working directory, which may hold a torch.py, off the module search path.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if job.method in (COMPILED, COMPILED_BY_BLOCKS):
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / _CACHE_FOLDER)
        environment["TRITON_CACHE_DIR"] = str(folder / _CACHE_FOLDER / "triton")
    return environment | dict(job.environment)


def _wait_for(
    command: list[str], environment: Mapping[str, str], output: Path, name: str, timeout_s: float | None
) -> int:
    """The child's exit code. However this is left, the child and what it started are gone."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout_s)
        except BaseException as error:  # an interrupt included: compilers in the child's session would go on
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise PipevaultError(
                    f"{name} took longer than {timeout_s:g} s and was ended. Allow more time. {_last_lines(output)}"
                ) from error
            raise


def _error_of_child(path: Path, name: str) -> PipevaultError:
    error = pickle.loads(path.read_bytes())
    assert isinstance(error, PipevaultError)
    error.args = (f"{name} failed: {error}", *error.args[1:])
    return error


def _ending(return_code: int) -> str:
    if return_code > 0:
        return f"ended with exit code {return_code}"
    try:
        return f"was killed by {signal.Signals(-return_code).name}"
    except ValueError:
        return f"was killed by signal {-return_code}"


def _last_lines(output: Path) -> str:
    text = output.read_bytes().decode("utf-8", "replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return f"It printed:\n{chr(10).join(lines[-_SHOWN_LINES:])}" if lines else "It printed nothing."
