"""One generation in a Python process of its own, so that nothing in memory is shared with any other.

The parent writes ``job.json`` into an empty folder and starts ``python -m pipevault.manager.fresh_process job.json``;
the child writes the pictures and ``result.json`` beside it, or ``error.pickle`` for an error of pipevault's own::

    {"job": {"model": "demo", "method": "eager", …}, "started_at_s": 1735689600.0}
    {"pictures": ["picture-0.png"], "pixels": ["<sha256>"], "seconds": {"open": 0.2, …}, "threads": 1, …}
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipevault.errors import PipevaultError, SettingsError
from pipevault.manager.request import Request

COMPILED, COMPILED_BY_BLOCKS = "torch.compile", "torch.compile by blocks"
METHODS = ("eager", COMPILED, COMPILED_BY_BLOCKS, "frozen")
JOB_FILE, RESULT_FILE, ERROR_FILE, OUTPUT_FILE = "job.json", "result.json", "error.pickle", "output.txt"
_CACHE_FOLDER = "compile-cache"
_SHOWN_LINES = 12


@dataclass(frozen=True)
class GenerationJob:
    """What a fresh process does: open ``model``, make it ready by ``method``, generate ``generations`` times.

    ``method``: ``eager`` (plain diffusers), ``torch.compile`` (each part that pipevault would freeze, with an empty
    compile cache), ``torch.compile by blocks`` (their repeated blocks, each kind compiled once), or ``frozen`` (loaded
    from the vault ``dir`` in ``mode`` at ``level``, with those settings and the further arguments ``load``).
    ``generations`` of 0 only makes ready, which in mode ``compile`` freezes what the vault lacks. ``environment`` is
    laid over the parent's. ``artifacts`` is a file for what torch.compile keeps (its Mega-cache): read if it is there,
    else written after the last generation.
    """

    model: str
    request: Request
    method: str
    dtype: str | None = None
    device: str | None = None
    pipeline_class: str | None = None
    dir: Path | None = None
    mode: str = "require"
    level: str | None = None
    build_config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    generations: int = 2
    regions: str | None = None
    jobs: int | None = None
    compile_profile: str | None = None
    load: Mapping[str, Any] = field(default_factory=dict)
    artifacts: Path | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingsError(f"There is no method {self.method!r}. Methods: {', '.join(METHODS)}.")

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "request": self.request.to_json(),
            "dir": None if self.dir is None else str(self.dir),
            "artifacts": None if self.artifacts is None else str(self.artifacts),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> GenerationJob:
        paths = {name: None if (path := document[name]) is None else Path(path) for name in ("dir", "artifacts")}
        return cls(**{**document, **paths, "request": Request.from_json(document["request"])})


@dataclass(frozen=True)
class GenerationResult:
    """``pictures`` are PNG files, or ``.npy`` files of what is no 8-bit image; ``pixels`` their SHA-256, in order.

    ``warm_pixels`` is of the second generation. ``latents`` is a ``.npy`` file where the pipeline shows its steps.
    ``seconds``: ``import`` (from the start of the process), ``open``, ``ready`` (from the constructed pipeline),
    ``first`` and ``warm`` (the first two generations). ``load_seconds`` are the steps of the load, if frozen;
    ``calls_s`` the generations, ``steps_s`` when the steps of the first one ended, from its begin. ``outcome`` is that
    of the load, empty unless frozen.
    ``peak_bytes`` is the largest resident memory of the process.
    """

    pictures: tuple[Path, ...]
    pixels: tuple[str, ...]
    warm_pixels: tuple[str, ...]
    latents: Path | None
    noise: str | None
    seconds: Mapping[str, float]
    outcome: str
    key: str | None
    device: str
    threads: int
    capability: str
    versions: Mapping[str, str]
    peak_bytes: int = 0
    load_seconds: Mapping[str, float] = field(default_factory=dict)
    calls_s: tuple[float, ...] = ()
    steps_s: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Files as their names, without the folder."""
        return {
            **asdict(self),
            "pictures": [path.name for path in self.pictures],
            "latents": None if self.latents is None else self.latents.name,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], folder: Path) -> GenerationResult:
        latents = document["latents"]
        return cls(
            **{
                **document,
                "pictures": tuple(folder / name for name in document["pictures"]),
                "pixels": tuple(document["pixels"]),
                "warm_pixels": tuple(document["warm_pixels"]),
                "latents": None if latents is None else folder / latents,
                "calls_s": tuple(document.get("calls_s", ())),
                "steps_s": tuple(document.get("steps_s", ())),
            }
        )


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
    command = [sys.executable, "-m", "pipevault.manager.fresh_process", str(folder / JOB_FILE)]
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


def main(job_file: Path) -> int:
    """The child: exit code 0 with a result, 1 with an error file; any other exception goes its way."""
    document = json.loads(job_file.read_text("utf-8"))
    folder = job_file.parent
    from pipevault.manager.fresh_generation import generate_for

    try:
        result = generate_for(
            GenerationJob.from_json(document["job"]), folder, started_at_s=float(document["started_at_s"])
        )
    except PipevaultError as error:
        (folder / ERROR_FILE).write_bytes(pickle.dumps(error))
        return 1
    (folder / RESULT_FILE).write_text(json.dumps(result.to_json()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
