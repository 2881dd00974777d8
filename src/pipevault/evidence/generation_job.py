"""One generation in a Python process of its own, so that nothing in memory is shared with any other.

The parent writes ``job.json`` into an empty folder and starts :mod:`pipevault.evidence.fresh_generation`; the child
writes arrays and ``result.json`` next to it, or leaves its error (:mod:`pipevault.files.child`)::

    {"job": {"model": "demo", "method": "eager", …}, "started_at_s": 1735689600.0}
    {"pictures": ["picture-0.npy"], "pixels": ["<sha256>"], "seconds": {"open": 0.2, …}, "threads": 1, …}
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from pipevault.errors import PipevaultError, SettingsError
from pipevault.evidence.request import Request
from pipevault.files.child import printed, run_child

COMPILED, COMPILED_BY_BLOCKS = COMPILING = ("torch.compile", "torch.compile by blocks")
JOB_FILE, RESULT_FILE = "job.json", "result.json"
_CHILD = "pipevault.evidence.fresh_generation"


@dataclass(frozen=True)
class GenerationJob:
    """A job of a fresh process: open ``model``, make it ready by ``method``, generate ``generations`` times.

    ``method``: ``eager`` (plain diffusers), ``torch.compile`` (each part that pipevault would freeze, with an empty
    compile cache), ``torch.compile by blocks`` (their repeated blocks, each kind compiled once), or ``frozen`` (loaded
    from the vault ``dir`` in ``mode`` at ``level``, with those settings and the further arguments ``load``).
    ``generations`` of 0 only makes ready, which in mode ``compile`` freezes what the vault lacks. ``environment`` is
    laid over the parent's. ``artifacts`` is a file for what torch.compile keeps (its Mega-cache): read if it is there,
    else written after the last generation.
    """

    model: str
    request: Request
    method: str = "eager"
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

    @classmethod
    def from_json(cls, document: Any) -> GenerationJob:
        return msgspec.convert(document, cls, dec_hook=lambda _, path: Path(path))


@dataclass(frozen=True)
class GenerationResult:
    """The result of a job. ``pictures`` are ``.npy`` files; ``pixels`` are their SHA-256, in order.

    ``warm_pixels`` is of the second generation. ``latents`` is a ``.npy`` file where the pipeline shows its steps.
    ``seconds``: ``import`` (from the start of the process), ``open``, ``ready`` (from the constructed pipeline),
    ``first`` and ``warm`` (the first two generations). ``load_seconds`` are the steps of the load, if frozen;
    ``calls_s`` the generations, ``steps_s`` when the steps of the first one ended, counted from its begin. ``outcome``
    is that of the load, empty unless frozen, and ``left_eager`` the reason of one that is partial. ``peak_bytes`` is
    the largest resident memory of the process.
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
    left_eager: str = ""

    @classmethod
    def from_json(cls, document: Any, folder: Path) -> GenerationResult:
        return msgspec.convert(document, cls, dec_hook=lambda _, name: folder / name)


def generate_in_fresh_process(
    job: GenerationJob, folder: Path, *, label: str = "", timeout_s: float | None = None
) -> GenerationResult:
    """Return what the job gave; its files are in ``folder``, which is made and must be empty.

    Raises what :func:`~pipevault.files.child.run_child` raises, and :class:`PipevaultError` without a result.
    """
    name = label or f"{job.method} generation of {job.model}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        text = json.dumps({"job": asdict(job), "started_at_s": time.time()}, default=os.fspath)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"The arguments of {name} must be plain JSON to go to another process: {error}.") from error
    (folder / JOB_FILE).write_text(text, encoding="utf-8")
    cache = folder / "compile-cache"
    environment = {**(compile_caches(cache) if job.method in COMPILING else {}), **job.environment}
    try:
        run_child(_CHILD, [str(folder / JOB_FILE)], folder, name=name, environment=environment, timeout_s=timeout_s)
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    try:
        return GenerationResult.from_json(json.loads((folder / RESULT_FILE).read_text("utf-8")), folder)
    except (OSError, ValueError) as error:
        raise PipevaultError(
            f"{name} failed: its process ended without a result that can be read ({type(error).__name__}: {error}). "
            f"{printed(folder)}"
        ) from error


def compile_caches(folder: Path) -> dict[str, str]:
    """Return the environment of a process that keeps in ``folder`` what torch.compile makes."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}


def own_user_cache(folder: Path) -> dict[str, str]:
    """Return the environment of a process whose user's cache folder is ``folder``, but for what the hub gave."""
    from huggingface_hub import constants

    return {"XDG_CACHE_HOME": str(folder), "HF_HOME": constants.HF_HOME}


def other_threads(threads: int) -> dict[str, str]:
    """Return the environment of a process on the CPU with another number of threads than ``threads``."""
    # Where MKL has a count of its own, torch takes that one.
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1" if threads > 1 else "2")


def smaller_kernels(capability: str) -> dict[str, str]:
    """Return the environment of a process with the kernels below torch's ``capability``; empty if there are none."""
    below = {"AVX512": "avx2", "AVX2": "default", "SVE256": "default", "VSX": "default"}
    return {"ATEN_CPU_CAPABILITY": below[capability]} if capability in below else {}
